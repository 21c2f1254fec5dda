"""qcompile: a graph-rewriting compiler that quantizes PyTorch models and proves each rewriting.

torch.compile(model, backend="qcompile")                 # one line, data-free, runs here
report = qcompile.quantize(model, "int8", batches)       # in place
qcompile.export_onnx(model, "out/")                      # an ONNX folder for CPU runtimes
"""

from qcompile.api.export_onnx import export_onnx
from qcompile.api.quantize import quantize
from qcompile.calibration.statistics import CalibrationError
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.save_load import load, save
from qcompile.ir.capture import CaptureError, capture
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.pipeline.presets import PRESETS, find_recipe
from qcompile.pipeline.run import NothingToQuantize
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.recipe.report import Report
from qcompile.version import VERSION

__version__ = VERSION

__all__ = [
    "PRESETS",
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "Format",
    "NothingToQuantize",
    "Program",
    "QTensor",
    "QuantLinear",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "capture",
    "export_onnx",
    "find_recipe",
    "load",
    "quantize",
    "quantize_tensor",
    "save",
]
