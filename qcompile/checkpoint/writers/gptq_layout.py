"""GPTQ's checkpoint layout, which GPTQModel, AutoGPTQ and vLLM read: words of codes along K.

    qweight  int32 [K b / 32, N]    unsigned codes, a little-endian stream along K for each output
    qzeros   int32 [G, N b / 32]    zero points along N: z - 1 in the format "gptq", z in "gptq_v2"
    scales   16 bits [G, N]
    g_idx    int32 [K]              the group of each column: k // g

with w = s (q - z), z = 2^(b-1) where the format is symmetric. Symmetric weights are written as "gptq", which every
reader takes, others as "gptq_v2", which has a zero point of 0. Source: GPTQModel 7.7, nn_modules/qlinear and
utils/model.py (convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.deferred_tensors import deferred
from qcompile.checkpoint.writers.export_refusals import quantized_linears, refuse
from qcompile.checkpoint.writers.float_tensors import SHORT, model_dtype
from qcompile.checkpoint.writers.int32_words import pack_words, unsigned_stream, words
from qcompile.checkpoint.writers.served_folder import ServedLayout
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format

TARGET = "gptq"
_LANES = 32  # channels that a word may hold a part of


def check_gptq(site: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> None:
    """Refuse a site that this layout cannot say.

    Args:
        site: its path.
        form: format of the weight.
        act: format of the activation, which must be float.
        columns: K.
        dtype: of the model.

    Raises:
        ExportError: with the site and the fix.
    """
    check_sixteen_bits(TARGET, site, form, act, columns, dtype)
    if form.is_float or form.two_level or form.zero == "float" or form.per == "tensor":
        fix = "use int4/group128/bf16, or int8/row/bf16"
        refuse(TARGET, site, f"weights in {form}", fix)
    if columns % _LANES:
        refuse(TARGET, site, f"K = {columns}, no multiple of {_LANES}", f"keep it float, Rule('{site}.*', keep=True)")


def check_sixteen_bits(
    target: str, site: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype
) -> None:
    """Refuse what no layout of weight-only kernels has: quantized activations, ragged groups, float32 scales.

    Raises:
        ExportError: with the site and the fix.
    """
    if act is not None:
        refuse(target, site, f"activations in {act}", "quantize the weights alone, act=None, or export to vllm")
    if dtype not in SHORT:
        label = str(dtype).removeprefix("torch.")
        refuse(target, site, f"a {label} model, whose kernels are of 16 bits", "load the model in bfloat16")
    if form.scale != SHORT[dtype]:
        text = f"{str(form).removesuffix(f'/{form.scale}')}/{SHORT[dtype]}"
        refuse(target, site, f"scales of {form} that are stored as the model is", f"quantize to {text}")
    if form.per == "group" and columns % form.width(columns):
        what = f"a last group of {columns % form.group} of {form.group} columns (K = {columns})"
        refuse(target, site, what, "use groups that divide K, as int4/group32/bf16")


def gptq_layout(model: nn.Module) -> ServedLayout:
    """All quantized linears of a model.

    Raises:
        ExportError: a site that cannot be said, two formats, or a float linear other than the logits.
    """
    linears, dtype = quantized_linears(model), model_dtype(model)
    form = one_format(TARGET, linears)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            refuse(TARGET, path, "a float linear other than the logits", "quantize it too, or export to vllm")
    symmetric, tensors = form.zero == "none", dict[str, Tensor]()
    for path, linear in linears.items():
        check_gptq(path, linear.format, linear.act, linear.in_features, dtype)
        if linear.out_features % _LANES:
            fix = f"keep it float, Rule('{path}.*', keep=True)"
            refuse(TARGET, path, f"N = {linear.out_features}, no multiple of {_LANES}", fix)
        found = deferred(lambda linear: _tensors(linear, dtype), linear)
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in found.items()}
    config = {
        "quant_method": TARGET,
        "bits": form.bits,
        "group_size": form.group if form.per == "group" else -1,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": isinstance(head, QuantLinear),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
    }
    return ServedLayout(TARGET, tensors, config, {"quantize_config.json": config})


def one_format(target: str, linears: dict[str, QuantLinear]) -> Format:
    """The format of all linears. Raises ExportError if there are two."""
    first, other = next(iter(linears.items())), None
    for path, linear in linears.items():
        if linear.format != first[1].format:
            other = path
            fix = f"use {first[1].format} everywhere (keep_lm_head for the logits), or export to vllm"
            refuse(target, other, f"{linear.format} beside {first[1].format} of {first[0]}", fix)
    return first[1].format


def _tensors(linear: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    form, rows, columns = linear.format, linear.out_features, linear.in_features
    scale = linear.scale.detach().cpu().reshape(rows, -1)
    if linear.zero is None:
        stored = torch.full(scale.shape, (1 << form.bits - 1) - 1, dtype=torch.uint8)  # z - 1
    else:
        stored = linear.zero.detach().cpu().reshape(rows, -1)
    found = {
        "qweight": words(unsigned_stream(linear.codes.detach().cpu(), form)).t(),
        "qzeros": pack_words(stored.t().contiguous(), form.bits),
        "scales": scale.t(),
        "g_idx": (torch.arange(columns) // form.width(columns)).to(torch.int32),
    }
    if linear.bias is not None:
        found["bias"] = linear.bias.detach().cpu().to(dtype)
    return found
