"""qcompile: a graph-rewriting compiler that quantizes PyTorch models and proves each rewriting.

torch.compile(model, backend="qcompile")                 # one line, data-free, runs here
report = qcompile.quantize(model, "int8", batches)       # in place
qcompile.export_onnx(model, "out/")                      # an ONNX folder for CPU runtimes
qcompile.export(model, "out/", to="vllm")                # a folder that vLLM, SGLang and transformers read
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from qcompile.api.compile_for_generate import compile_for_generate
from qcompile.api.export_model import export
from qcompile.api.export_onnx import export_onnx
from qcompile.api.load_package import load_package
from qcompile.api.package_model import package
from qcompile.api.quantize import quantize
from qcompile.api.verify_model import verify_model
from qcompile.calibration.statistics import CalibrationError
from qcompile.calibration.text import batches as calibration_batches
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.save_load import load, save
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.generation.pretrained import load_pretrained
from qcompile.ir.capture import CaptureError, capture
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.run import NothingToQuantize
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.training import optim
from qcompile.training.adapters import qa_lora
from qcompile.training.peft_adapters import load_adapter, peft_config
from qcompile.training.settle import settle
from qcompile.training.train import train
from qcompile.transformers_plugin.registration import register_when_imported
from qcompile.version import VERSION, refuse_other_distribution

if TYPE_CHECKING:
    from qcompile.modules.kv_cache import KVCache
    from qcompile.modules.static_kv_cache import StaticKVCache
    from qcompile.transformers_plugin.qcompile_config import QCompileConfig

__version__ = VERSION
register_when_imported()
refuse_other_distribution()

__all__ = [
    "PRESETS",
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "Format",
    "KVCache",
    "NothingToQuantize",
    "OnnxOptions",
    "Program",
    "QCompileConfig",
    "QTensor",
    "QuantLinear",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "StaticKVCache",
    "calibration_batches",
    "capture",
    "compile_for_generate",
    "export",
    "export_onnx",
    "find_recipe",
    "load",
    "load_adapter",
    "load_package",
    "load_pretrained",
    "optim",
    "package",
    "peft_config",
    "qa_lora",
    "quantize",
    "quantize_tensor",
    "save",
    "settle",
    "train",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    """What is first used: classes of transformers, which takes seconds to import."""
    if name == "KVCache":
        from qcompile.modules.kv_cache import KVCache

        return KVCache
    if name == "StaticKVCache":
        from qcompile.modules.static_kv_cache import StaticKVCache

        if torch.cuda.is_available() and importlib.util.find_spec("triton"):
            import qcompile.codegen.triton.triton_kv_ops  # noqa: F401  its kernels, also where nothing is compiled

        return StaticKVCache
    if name == "QCompileConfig":
        from qcompile.transformers_plugin.qcompile_config import QCompileConfig

        return QCompileConfig
    raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
