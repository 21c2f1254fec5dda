"""Examples that models bring, or that their configs describe."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from zoo import SIZES, build

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.api.model_example import own_example, own_examples, traceable_example
from qcompile.ir.call_tree import tensors_of
from qcompile.recipe.certificate import relative_error

PAIR = dict(
    vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(max_position_embeddings=32, **PAIR)),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(num_mel_bins=8, max_source_positions=16, max_target_positions=16, **PAIR)
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**SIZES), image_token_index=100,
            vision_feature_layer=-1,
        )
    ),
}  # fmt: skip
INPUTS = {
    "t5": {"input_ids": (2, 8), "decoder_input_ids": (2, 8)},
    "bart": {"input_ids": (2, 8), "decoder_input_ids": (2, 8)},
    "whisper": {"input_features": (2, 8, 32), "decoder_input_ids": (2, 8)},
    "llava": {"input_ids": (2, 12), "pixel_values": (2, 3, 16, 16)},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_config_says_what_a_model_takes(name):
    model = MODELS[name]().eval()
    state = torch.get_rng_state()
    example = own_example(model)
    assert {key: tuple(value.shape) for key, value in example.items()} == INPUTS[name]
    assert torch.equal(torch.get_rng_state(), state)
    if name == "llava":
        assert example["input_ids"].eq(100).sum(1).tolist() == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_several_parts_are_quantized_as_they_come(name, use_cache):
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    model.config.use_cache = use_cache
    inputs = own_example(model)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    want = tensors_of(model(**inputs))[:1]
    report = qcompile.quantize(model, "int8", progress=False)
    products = [site for site in report.sites if "convolution" not in site.reason]
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == linears == len(products)
    assert 0 < relative_error(tensors_of(model(**inputs))[:1], want) < 0.05
    assert model.config.use_cache is use_cache


def test_models_that_bring_their_own_example():
    args, kwargs = traceable_example(build("llama"))
    assert not args and list(kwargs) == ["input_ids"] and kwargs["input_ids"].shape[0] >= 2
    with pytest.raises(RecipeError, match="Linear brings no example input to trace with. Fix"):
        own_example(nn.Linear(4, 4))


def test_a_vocabulary_below_the_ids_of_the_example():
    class Few(nn.Module):
        dummy_inputs = {"ids": torch.tensor([[7, 9]])}

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 8)
            self.drop = nn.Dropout()

        def forward(self, ids):
            assert not self.training
            return self.table(ids)

    model = Few()
    with pytest.raises(RecipeError, match="it does not run on ids .IndexError"):
        own_example(model)
    assert model.training and model.drop.training
    model.dummy_inputs = {"ids": torch.tensor([[1, 2]])}
    assert len(list(own_examples(model))) == 1
