"""Compile kernels for a GPU that is not there, and look at what came out.

ptxas and the disassembler come with triton. "It compiled" is not enough: a kernel may spill registers to memory, take
slow instructions, or lose its body (triton 3.6 once compiled a kernel for sm_100 to a bare trap, without an error).
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.aot.main_loop import main_loop, programs_together
from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.experts_spec import AnyExperts, QuantizedExperts, SumExperts
from qcompile.codegen.triton.kernels.group_spec import GemmGroup
from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW, KernelSpec, Pack, RowQuant, SumK
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.launch.tiles import Launch, compiler_options

ARCHITECTURES = (80, 89, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have

# Tensor core instructions by family, as the disassembler writes them.
MMA_FAMILIES = {
    "wgmma": r"\b[HIQ]GMMA\.",  # sm_90: of a warp group
    "tcgen05": r"\bUTC[A-Z]*MMA",  # sm_100
    "mma": r"\b[HIQ]MMA\.",  # of a warp
}


_ROUNDING_TYPES = (
    dict.fromkeys(("step", "limit", "change", "old_scale"), "*fp32")
    | dict.fromkeys(("old_codes", "old_zero", "lost", "bad"), "*u8")
    | dict.fromkeys(("levels", "lowest", "highest", "keep"), "fp32")
    | dict(stream="*i32", beyond="*i64", groups="i32", count="i32")
)  # of what only the kernels of training have

_MULTIPLES = ("N", "K", "x_row", "gate_row", "capacity", "channels")  # sizes that 16 divides, as a rule
_CACHE_TYPES = (
    dict.fromkeys(("keys", "values"), "*i16")
    | dict.fromkeys(("key_scales", "value_scales"), "*i32")
    | dict.fromkeys(("weights", "parts", "mask"), "*fp32")
    | dict.fromkeys(("capacity", "window", "splits", "H"), "i32")
    | dict(q="*bf16", length="*i64", factor="fp32", cap="fp32")
)  # of what only the kernels of a KV cache have


@dataclass(frozen=True)
class KernelCost:
    """What a kernel costs; the fields are those of budget.json.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared: bytes of shared memory of a program.
        instructions: in the whole kernel.
        mma: tensor core instructions by family.
        from_registers: matmuls whose left operand comes from registers (sm_90).
        together: programs that share a multiprocessor.
        loop: instructions of a warp in one trip of the main loop, by kind (main_loop.py).
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    mma: dict[str, int]
    from_registers: int
    together: int
    loop: dict[str, int]


def types_of(spec: KernelSpec) -> dict[str, str]:
    """Triton's type of every argument that a kernel of this spec may have."""
    code_types = {"int8": "*i8", "fp8": "*fp8e4nv", "int4": "*i8"}
    values, codes = f"*{spec.dtype}", getattr(spec, "codes", "")
    found = dict.fromkeys(("x", "residual", "total", "value", "gate", "bias", "low", "up", "out"), values)
    found |= dict.fromkeys(("scale", "x_scale", "gain", "shift", "smooth", "signs"), "*fp32")
    found |= dict.fromkeys(("left", "right"), "*bf16")
    found |= dict.fromkeys(("M", "N", "K", "blocks", "each", "parts", "width", "x_row", "gate_row"), "i32")
    found |= dict(zero="*fp32" if getattr(spec, "zero", "") == "float" else "*u8", eps="fp32")
    found |= dict(w="*i16" if getattr(spec, "word", 8) == 16 else "*u8")
    if isinstance(spec, Gemm8):
        found |= dict(x=code_types[codes], w=code_types[codes])
    if isinstance(spec, GemmW4A8):
        found |= dict(x="*i8", steps="*i32")
        found |= dict(out="*i32") if spec.parts else {}
    if isinstance(spec, GemmGroup):
        found |= dict(x="*fp8e4nv" if spec.fp8 else "*i8", steps="*i64", groups="i32")
        found |= dict(out="*fp32") if spec.parts else {}
    if isinstance(spec, AnyExperts | SumExperts):
        found |= dict(rows="*i64", ends="*i32", T="i32", experts="i32", channels="i32")
    if isinstance(spec, (KVDecode, KVMerge, KVRead, KVWrite)):
        new = "new_keys", "new_values", "read_keys", "read_values"
        found |= _CACHE_TYPES | dict.fromkeys(new, values)
        found |= dict(out="*fp32") if isinstance(spec, KVDecode) else {}
    if isinstance(spec, RowQuant):
        found |= dict(codes=code_types[codes])
    if isinstance(spec, (RoundGradient, RoundValues, ChangeCodes)):
        found |= _ROUNDING_TYPES | dict(codes="*u8" if isinstance(spec, ChangeCodes) else "*i8")
    if isinstance(spec, Pack):
        found |= dict(out="*i16" if spec.word == 16 else "*u8", stored="*u8")
    if isinstance(spec, (Gemm8, GemmW)) and spec.parts:
        found |= dict(out="*i32" if codes == "int8" else "*fp32")
    if getattr(spec, "paired", False):
        found |= dict(scale="*i32")
    if isinstance(spec, SumK | SumExperts):
        found |= dict(sums="*i32" if codes == "int8" else "*fp32")
    return found


def compile_kernel(spec: KernelSpec, launch: Launch, architecture: int, **constants: int) -> KernelCost:
    """Compile for sm_`architecture`, with the hints that Triton's own launcher gives (sizes divisible by 16).

    Args:
        spec: what the kernel computes.
        launch: its sizes.
        architecture: 90 for sm_90.
        constants: constexpr arguments that are not in the launch.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where there is nothing to compile; fused roundings in a kernel that is
            exact; and whatever the compiler raises.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels. Fix: unset it to compile them")
    function = kernel(spec)
    names, types = list(function.arg_names), types_of(spec)
    fixed = launch.constants(names) | {name: value for name, value in constants.items() if name in names}
    fixed |= {"ASM": True} if "ASM" in names else {}
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    aligned = [["tt.divisibility", 16]]
    multiples = {"each"} if isinstance(spec, Gemm8) else set()  # of 16: columns there, blocks in other kernels
    ragged = getattr(spec, "ragged", False) and not isinstance(spec, QuantizedExperts)  # which demand 16 of any K
    multiples |= set() if ragged else set(_MULTIPLES)
    hints = {
        (index,): aligned for index, name in enumerate(names) if signature[name].startswith("*") or name in multiples
    }
    by_index = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=by_index, attrs=hints)
    with contextlib.redirect_stdout(io.StringIO()):  # a failing ptxas prints all of its input
        compiled = compile_source(source, GPUTarget("cuda", architecture, 32), compiler_options(spec, launch))
    if spec.exact and re.search(r"\bfma\.", compiled.asm["ptx"]):
        raise RuntimeError(
            f"{spec}: a product and a sum are rounded once, and the bits are not those of the definition"
        )
    return _inspect(compiled, launch.num_warps, architecture)


def _inspect(compiled: Any, warps: int, architecture: int) -> KernelCost:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    text = listing.stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert resources is not None, usage.stdout
    spilled = int(resources[2]) if re.search(r"\b(LDL|STL)\b", text) else 0
    counts = collections.Counter({family: len(re.findall(rule, text)) for family, rule in MMA_FAMILIES.items()})
    # wgmma names its left operand by a descriptor when it lies in shared memory, else by a list of registers
    from_registers = len(re.findall(r"wgmma\.mma_async[^;]*?\},\s*\{[^}]*\}", compiled.asm["ptx"]))
    registers, shared = int(resources[1]), compiled.metadata.shared
    return KernelCost(
        registers=registers,
        spilled=spilled,
        shared=shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,5}\*/", text)),
        mma={family: count for family, count in counts.items() if count},
        from_registers=from_registers,
        together=programs_together(registers, shared, warps, architecture),
        loop=main_loop(text, warps).by_kind,
    )


def complaints(spec: KernelSpec, architecture: int, cost: KernelCost) -> list[str]:
    """What must not be: spills, a lost body, slow instructions, more shared memory than there is."""
    found = []
    if cost.spilled:
        found.append(f"{cost.spilled} bytes of a thread are spilled")
    available = SHARED_MEMORY.get(architecture, min(SHARED_MEMORY.values()))
    if cost.shared > available:
        found.append(f"{cost.shared} bytes of shared memory; sm_{architecture} has {available}")
    if isinstance(spec, (Gemm8, GemmW, GemmW4A8, GemmGroup, KVDecode)):
        family = None if isinstance(spec, KVDecode) else {90: "wgmma"}.get(architecture)
        if not sum(cost.mma.values()):
            found.append("no tensor core instruction: the body is lost")
        elif family and not cost.mma.get(family):
            found.append(f"tensor cores by {', '.join(cost.mma)}, not by {family}")
        if architecture == 90 and isinstance(spec, (GemmW, GemmW4A8, GemmGroup)) and not cost.from_registers:
            found.append("the weights go through shared memory, not from registers to the tensor cores")
    elif cost.instructions < 40:
        found.append(f"{cost.instructions} instructions: the body is lost")
    return found
