"""Rewriting passes, one algorithm a file; imported as `qcompile.passes`.

Importing this package registers every pass by its config type (see qcompile/recipe.py).
"""

if __name__ == "passes":  # a second copy with a registry of its own would break isinstance checks
    raise ImportError("import qcompile.passes, not passes")

from qcompile.passes.awq import AWQ, awq
from qcompile.passes.calibrate_prefix import CalibratePrefix, calibrate_prefix
from qcompile.passes.dgq import DGQ, dgq
from qcompile.passes.finequant import FineQuant, finequant
from qcompile.passes.fold_norm import FoldNorm, fold_norm
from qcompile.passes.fuse import Fuse, fuse
from qcompile.passes.gptaq import GPTAQ, gptaq
from qcompile.passes.gptq import GPTQ, gptq
from qcompile.passes.hqq import HQQ, hqq
from qcompile.passes.intact_kv import IntactKV, intact_kv
from qcompile.passes.learn_rotation import LearnRotation, learn_rotation
from qcompile.passes.lorc import LoRC, lorc
from qcompile.passes.per_tensor import PerTensor, per_tensor
from qcompile.passes.quantize import Quantize, quantize
from qcompile.passes.quantize_kv import QuantizeKV, quantize_kv
from qcompile.passes.reorder import Reorder, reorder
from qcompile.passes.rotate import Rotate, rotate
from qcompile.passes.rotate_online import RotateOnline, rotate_online
from qcompile.passes.rotate_principal import RotatePrincipal, rotate_principal
from qcompile.passes.smooth import Smooth, smooth
from qcompile.passes.smooth_attention import SmoothAttention, smooth_attention
from qcompile.passes.smoothquant_plus import SmoothQuantPlus, smoothquant_plus
from qcompile.passes.untie import Untie, untie

__all__ = [
    "AWQ",
    "CalibratePrefix",
    "DGQ",
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "IntactKV",
    "LearnRotation",
    "LoRC",
    "PerTensor",
    "FineQuant",
    "FoldNorm",
    "Fuse",
    "Quantize",
    "QuantizeKV",
    "Reorder",
    "Rotate",
    "RotateOnline",
    "RotatePrincipal",
    "Smooth",
    "SmoothAttention",
    "SmoothQuantPlus",
    "Untie",
    "awq",
    "calibrate_prefix",
    "dgq",
    "finequant",
    "fold_norm",
    "fuse",
    "gptaq",
    "gptq",
    "hqq",
    "intact_kv",
    "learn_rotation",
    "lorc",
    "per_tensor",
    "quantize",
    "quantize_kv",
    "reorder",
    "rotate",
    "rotate_online",
    "rotate_principal",
    "smooth",
    "smooth_attention",
    "smoothquant_plus",
    "untie",
]
