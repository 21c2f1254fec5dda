"""Rewriting passes, one algorithm a file; imported as `qcompile.passes`.

Importing this package registers every pass by its config type (see qcompile/recipe/registry.py).
"""

if __name__ == "passes":  # a second copy with a registry of its own would break isinstance checks
    raise ImportError("import qcompile.passes, not passes")

from qcompile.passes.activations.per_tensor_activations import PerTensorActivations
from qcompile.passes.equivalent.awq import AWQ
from qcompile.passes.equivalent.fold_norm import FoldNorm
from qcompile.passes.equivalent.online_hadamard import OnlineHadamard
from qcompile.passes.equivalent.reorder_channels import ReorderChannels
from qcompile.passes.equivalent.rotate import Rotate
from qcompile.passes.equivalent.rotate_principal import RotatePrincipal
from qcompile.passes.equivalent.smooth_attention import SmoothAttention
from qcompile.passes.equivalent.smoothquant import SmoothQuant
from qcompile.passes.equivalent.smoothquant_plus import SmoothQuantPlus
from qcompile.passes.equivalent.spinquant import SpinQuant
from qcompile.passes.equivalent.untie import Untie
from qcompile.passes.kv_cache.calibrate_prefix import CalibratePrefix
from qcompile.passes.kv_cache.intact_kv import IntactKV
from qcompile.passes.kv_cache.quantize_kv import QuantizeKV
from qcompile.passes.qdq.fuse_qdq import Fuse
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.passes.training.fixed_point import FixedPoint
from qcompile.passes.training.q_galore import QGaLore
from qcompile.passes.training.qa_lora import QALoRA
from qcompile.passes.weights import round_to_nearest  # noqa: F401  registers Quantize
from qcompile.passes.weights.dgq import DGQ
from qcompile.passes.weights.finequant import FineQuant
from qcompile.passes.weights.gptaq import GPTAQ
from qcompile.passes.weights.gptq import GPTQ
from qcompile.passes.weights.hqq import HQQ
from qcompile.passes.weights.lorc import LoRC

__all__ = [
    "AWQ",
    "CalibratePrefix",
    "DGQ",
    "FineQuant",
    "FixedPoint",
    "FoldNorm",
    "Fuse",
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "IntactKV",
    "LoRC",
    "OnlineHadamard",
    "PerTensorActivations",
    "QALoRA",
    "QGaLore",
    "Quantize",
    "QuantizeKV",
    "ReorderChannels",
    "Rotate",
    "RotatePrincipal",
    "SmoothAttention",
    "SmoothQuant",
    "SmoothQuantPlus",
    "SpinQuant",
    "Untie",
]
