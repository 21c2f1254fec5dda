"""Small models of transformers whose sizes the kernels of servers take, quantized in a given format."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qcompile.modules.quant_linear import QuantLinear
from qcompile.modules.tied_names import forget_broken_ties, named_ties
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

FLOAT_LOGITS = (Rule("lm_head.*", keep=True),)


def decoder(dtype=torch.float32, *, tied=False, bias=False, seed=0):
    """One layer; K is 128 or 256."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # tails, so that codes differ
            parameter.copy_(torch.randn(parameter.shape) * (1 + 2 * torch.rand(parameter.shape) ** 8) * 0.1)
        else:
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape) if "norm" in name else torch.randn(parameter.shape))
    return model


def recipe(weight, act=None, *, rules=FLOAT_LOGITS, **options):
    """Round to nearest."""
    return Recipe("served", (Quantize(weight, act, **options), Fuse()), rules)


def quantized(weight, act=None, dtype=torch.float32, *, rules=FLOAT_LOGITS, tied=False, bias=False, clip=False):
    """A decoder rounded to nearest in a format, module by module: what `quantize` with `recipe` gives, in no time."""
    model = decoder(dtype, tied=tied, bias=bias)
    ties = named_ties(model)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            rule = next((rule for rule in rules if rule.matches(f"{path}.weight")), None)
            if rule is None or not rule.keep:
                form = Format.parse(str((rule and rule.weight) or weight))
                codes = quantize_tensor(linear.weight, form, clip=clip).stored_parts
                tensors = {**dict(zip(PARTS, codes, strict=True)), "bias": linear.bias}
                act_format = None if act is None else Format.parse(act)
                model.set_submodule(
                    path, QuantLinear(linear.in_features, linear.out_features, form, act_format, tensors)
                )
    forget_broken_ties(model, ties)
    model.qcompile_recipe = recipe(weight, act, rules=rules).to_json()
    return model


def ids():
    """Two texts of ten tokens."""
    return torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(3))


def permuted(weight, heads):
    """Rows of a query or key weight in the order of llama.cpp, whose rotary embedding takes neighbors."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_template(model, path, extra=()):
    """A decoder as llama.cpp's converter writes it, in float32."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        tensor = parameter.float() if heads is None else permuted(parameter.float(), heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    for name, tensor in extra:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
