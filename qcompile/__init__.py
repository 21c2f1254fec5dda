"""qcompile: a graph-rewriting compiler that quantizes PyTorch models and proves each rewriting.

torch.compile(model, backend="qcompile")                 # one line, data-free, runs here
report = qcompile.quantize(model, "int8", batches)       # in place
qcompile.export_onnx(model, "out/")                      # an ONNX folder for CPU runtimes
"""

from qcompile.calibrate import CalibrationError
from qcompile.capture import CaptureError, capture
from qcompile.checkpoint import CheckpointError, load, save
from qcompile.export import export_onnx
from qcompile.formats import Format, QTensor
from qcompile.module import QuantLinear
from qcompile.pipeline import NothingToQuantize
from qcompile.presets import PRESETS, find_recipe
from qcompile.program import Program
from qcompile.quantize import quantize
from qcompile.recipe import Recipe, RecipeError, Rule
from qcompile.report import Report
from qcompile.rounding import quantize_tensor

__version__ = "0.1.0"

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
