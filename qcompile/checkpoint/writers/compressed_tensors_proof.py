"""What was written for compressed-tensors, read back by that package and compared bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.compressed_tensors_layout import TARGET, Scheme
from qcompile.checkpoint.writers.expert_linears import served_linears
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.shard_reader import ShardReader
from qcompile.recipe.strict_json import read_json


def can_reopen() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("compressed_tensors") is not None


def prove_compressed(folder: Path, model: nn.Module, schemes: dict[str, Scheme]) -> int:
    """Decompress every weight of a folder by the package, and compare it with the model's.

    The package must find the scheme of every quantized linear by the config alone, and none for a float one.

    Args:
        folder: as written.
        model: the quantized model.
        schemes: path -> scheme, as written.

    Returns:
        How many weights were compared, all of them equal: in the dtype that their scales are stored in.

    Raises:
        ExportError: one differs, or the package reads the config otherwise.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    reader = ShardReader(folder)
    config = QuantizationConfig.model_validate(read_json(folder / "config.json")["quantization_config"])
    linears = served_linears(model, TARGET)
    floats = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in (*floats, *linears):
        found = _matched(config, path)
        want = QuantizationScheme(targets=["Linear"], **schemes[path]) if path in schemes else None
        if (found is None) != (want is None) or (found and want and _plain(found) != _plain(want)):
            raise ExportError(f"{path}: compressed-tensors reads {found} of config.json, not {want}")
    for path, linear in linears.items():
        scheme = QuantizationScheme(targets=["Linear"], **schemes[path])
        compressor = BaseCompressor.get_value_from_registry(schemes[path]["format"])
        names = [name for name in compressor.compression_param_names(scheme) if name != "weight_zero_point"]
        names += ["weight_zero_point"] * (linear.zero is not None)
        weight = compressor.decompress({n: reader.tensor(f"{path}.{n}") for n in names}, scheme)["weight"]
        require_same(path, weight, linear.weight.cpu(), "compressed-tensors")
    return len(schemes)


def require_same(path: str, read: Tensor, ours: Tensor, by: str) -> None:
    """Refuse a weight that another package reads otherwise; ours is rounded to the dtype of what was read.

    Raises:
        ExportError: with the place and the difference.
    """
    if read.shape != ours.shape or not torch.equal(read, ours.to(read.dtype)):
        difference = float((read.double() - ours.double()).abs().max()) if read.shape == ours.shape else float("nan")
        raise ExportError(
            f"{path}: {by} reads weights of the written file that differ by {difference:.3g} from the model's. Fix: "
            "report it, with the versions of both packages; nothing was written"
        )


def _matched(config: Any, path: str) -> Any:
    """The scheme that the package finds for a linear, or None."""
    from compressed_tensors.utils.match import is_match

    like = nn.Linear(1, 1, device="meta")
    for scheme in config.config_groups.values():
        if is_match(path, like, scheme.targets, config.ignore):
            return scheme
    return None


def _plain(scheme: Any) -> dict[str, Any]:
    data: dict[str, Any] = scheme.model_dump()
    return {key: value for key, value in data.items() if key != "targets"}
