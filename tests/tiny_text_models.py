"""Small causal LMs. One is quantized in its weights: its compiled graphs agree with it to the last token."""

from __future__ import annotations

import torch
import zoo
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}


def quantized_llama(recipe: str = "w4a16") -> LlamaForCausalLM:
    """The same model at every call."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    qcompile.quantize(model, recipe, progress=False, verify=False)
    return model


def one_layer_llama(vocabulary: int) -> LlamaForCausalLM:
    """A float model with tied logits, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **{**zoo.SIZES, "vocab_size": vocabulary, "num_hidden_layers": 1})
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def greedy(model, ids, tokens=12, **options):
    """The tokens that a model continues ids [1, N] with."""
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, **{**fixed, **options})
