"""compressed-tensors: the checkpoint format that vLLM, SGLang and transformers read.

    int b, packed      weight_packed int32 [N, ceil(K b / 32)]: q + 2^(b-1), a little-endian stream along K
                       weight_scale [N, G], weight_shape int64 [2]
                       weight_zero_point int32 [ceil(N b / 32), G], packed along N, where there are zero points
    W8A8               weight int8 [N, K], weight_scale float32 [N, 1] or [1]
    fp8                weight float8_e4m3fn [N, K], weight_scale float32 [N, 1] or [1]

with w = s (q - z) in all of them. Source: the package compressed-tensors 0.20, compressors/pack_quantized and
compressors/naive_quantized, and its quantization/quant_config.py for config.json.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.deferred_tensors import deferred
from qcompile.checkpoint.writers.expert_linears import served_linears
from qcompile.checkpoint.writers.export_refusals import refuse
from qcompile.checkpoint.writers.float_tensors import SHORT, model_dtype
from qcompile.checkpoint.writers.int32_words import pack_words, unsigned_stream, words
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format

TARGET = "compressed-tensors"
_VERSION = "0.17.0"  # of the format: the oldest whose schema this is
_STRATEGIES = {"row": "channel", "tensor": "tensor", "group": "group"}

Scheme = dict[str, Any]
"""One entry of config_groups without its targets: weights, input_activations, output_activations, format."""


def scheme_of(site: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> Scheme:
    """What config.json says of one linear.

    Args:
        site: its path, for messages.
        form: format of the weight.
        act: format of the activation; None: float.
        columns: K.
        dtype: of the model.

    Raises:
        ExportError: the format has no form here.
    """
    _check_weight(site, form, columns)
    kind = _kind(site, form, act)
    if kind == "pack-quantized" and dtype in SHORT and form.scale != SHORT[dtype]:
        text = f"{str(form).removesuffix(f'/{form.scale}')}/{SHORT[dtype]}"
        what = f"scales of {form} that a {str(dtype).removeprefix('torch.')} model stores in its own dtype"
        refuse(TARGET, site, what, f"quantize to {text}, or export a float32 model")
    weights = _arguments(form, dynamic=False) | {"strategy": _STRATEGIES[form.per]}
    if form.per == "group":
        weights |= {"group_size": form.width(columns)}
    activations = None
    if act is not None:
        if act.per != "row" or act.smooth or act.dtype == "fp4":
            refuse(TARGET, site, f"activations in {act}", "use one scale for a token, as int8/row or fp8/row")
        activations = _arguments(act, dynamic=True) | {"strategy": "token"}
    return {"format": kind, "weights": weights, "input_activations": activations, "output_activations": None}


def stored_tensors(linear: QuantLinear, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear, by their names below its path, on the CPU."""
    form, kind = linear.format, scheme["format"]
    codes, scale = linear.codes.detach().cpu(), linear.scale.detach().cpu()
    scale = scale.reshape(1) if form.per == "tensor" else scale.reshape(linear.out_features, -1)
    found: dict[str, Tensor] = {}
    if kind == "pack-quantized":
        found["weight_packed"] = words(unsigned_stream(codes, form))
        found["weight_scale"] = scale.to(dtype)  # of the same values: see scheme_of
        found["weight_shape"] = torch.tensor([linear.out_features, linear.in_features])
        if linear.zero is not None:
            zero = linear.zero.detach().cpu().reshape(linear.out_features, -1)
            found["weight_zero_point"] = pack_words(zero.t().contiguous(), form.bits).t().contiguous()
    else:
        found["weight"], found["weight_scale"] = codes, scale.float()
    if linear.bias is not None:
        found["bias"] = linear.bias.detach().cpu().to(dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def compressed_layout(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Scheme]]:
    """All quantized linears of a model, those of experts too.

    Returns:
        Their tensors by name, the quantization_config of config.json, and the scheme of every path.

    Raises:
        ExportError: a format that cannot be said.
    """
    dtype = model_dtype(model)
    linears = served_linears(model, TARGET)
    schemes = {path: scheme_of(path, m.format, m.act, m.in_features, dtype) for path, m in linears.items()}
    tensors = {
        f"{path}.{name}": tensor
        for path, linear in linears.items()
        for name, tensor in deferred(partial(stored_tensors, scheme=schemes[path], dtype=dtype), linear).items()
    }
    ignored = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tensors, quantization_config(schemes, ignored), schemes


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json.

    One scheme targets the class Linear; of several each names its modules, those with the fewest first.

    Args:
        schemes: path -> scheme.
        ignored: paths of linears that stay float.
    """
    groups: dict[str, list[str]] = {}
    for path, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(path)
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    kinds = {scheme["format"] for scheme in schemes.values()}
    return {
        "quant_method": TARGET,
        "version": _VERSION,
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{index}": {"targets": paths if len(ordered) > 1 else ["Linear"], **json.loads(text)}
            for index, (text, paths) in enumerate(ordered)
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _arguments(form: Format, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "float" if form.is_float else "int",
        "symmetric": form.zero == "none",
        "dynamic": dynamic,
    }


def _check_weight(site: str, form: Format, columns: int) -> None:
    """Refuse what no kind of tensor here holds."""
    if form.dtype == "fp4":
        fix = "use int4/group128/bf16"
        refuse(TARGET, site, f"e2m1 codes with scales of ours ({form}), neither MXFP4 nor NVFP4", fix)
    if form.two_level:
        fix = "use a single level, as int4/group128/bf16"
        refuse(TARGET, site, f"integer group scales under a float scale of rows ({form})", fix)
    if form.zero == "float":
        refuse(TARGET, site, f"zero points that are no integers ({form})", "use int4/group128/zero, or symmetric")
    if form.per == "group" and columns % form.width(columns):
        sizes = [size for size in (128, 64, 32, 16) if columns % size == 0]
        fix = f"use groups of {sizes[0]}" if sizes else "use one scale for a row, as int4/row"
        refuse(TARGET, site, f"a last group of {columns % form.group} of {form.group} columns (K = {columns})", fix)


def _kind(site: str, form: Format, act: Format | None) -> str:
    """The kind of tensors for a pair of formats, of those that servers have kernels for."""
    if form.is_float:
        if form.per == "group" or (act is not None and act.dtype != "fp8"):
            fix = "use fp8/row for both, or float activations"
            refuse(TARGET, site, f"{form} weights with {act or 'float'} activations", fix)
        return "float-quantized"
    if form.bits == 8 and act is not None:
        if act.is_float or act.bits != 8 or form.zero != "none" or form.per == "group":
            fix = "use symmetric int8/row weights with int8/row activations"
            refuse(TARGET, site, f"{form} weights with {act} activations", fix)
        return "int-quantized"
    if form.per == "tensor":
        refuse(TARGET, site, f"one scale for a packed weight ({form})", "use a scale for each row or group")
    return "pack-quantized"
