"""What one trip of a kernel's main loop costs, read from its machine code.

A multiprocessor has four schedulers; each starts one instruction of a warp in a cycle. Instructions of integers and
logic (the pipe "alu") hold their pipe for two cycles, those of float32 ("fma") for one, integer multiplications for
two. So a trip takes a scheduler at least

    issue  =  instructions x warps / 4        alu  =  2 x integer instructions x warps / 4

cycles. Loads that go from memory to shared memory without a register (LDGSTS, TMA) are on their way while the loop
computes; every other load from memory (`waited_loads`) is one that a trip waits for, as far as nothing hides it.

Source: NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions" (results of a multiprocessor per cycle).
"""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass

# Kinds of instructions by the beginning of their names in the disassembler's listing; the first that fits.
KINDS = {
    "tensor": r"[HIQBO]GMMA|[HIQBO]?MMA|UTC\w*MMA",
    "async_load": r"LDGSTS|UTMALDG|UBLKCP",
    "load": r"LDG\b",  # not LDGDEPBAR, which only marks a group of asynchronous loads
    "store": r"STG|RED|ATOM|UTMASTG",
    "shared_matrix_load": r"LDSM",
    "shared_load": r"LDS",
    "shared_store": r"STS",
    "spill": r"LDL|STL",
    "convert": r"I2F|F2F|F2I|I2I|FRND|I2FP|F2FP",
    "permute": r"PRMT",
    "logic": r"LOP|PLOP",
    "shift": r"SHF|SHL|SHR",
    "integer": r"IADD|LEA|VIADD|VIMNMX|IABS|ISETP|FSETP|SEL|ISET|PSETP|IMNMX",
    "multiply_integer": r"IMAD|IMUL|IDP",
    "float32": r"FFMA|FADD|FMUL|FMNMX|FSEL",
    "float16": r"HFMA2|HADD2|HMUL2|HMNMX2",
}
_ALU = ("convert", "permute", "logic", "shift", "integer")  # two cycles each, of a scheduler
_FMA = ("float32", "float16")  # one cycle
_RULES = [(kind, re.compile(rule)) for kind, rule in KINDS.items()]
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^\s*(\.L\w*):")
_TARGET = re.compile(r"`\((\.L\w*)\)")


@dataclass(frozen=True)
class LoopCost:
    """One trip of the main loop, of one program.

    Attributes:
        instructions: of a warp.
        by_kind: of a warp, by the names of KINDS; "other" for the rest.
        warps: of a program.
    """

    instructions: int
    by_kind: dict[str, int]
    warps: int

    @property
    def issue(self) -> float:
        """Cycles in which a scheduler starts the instructions of a program."""
        return self.instructions * self.warps / 4

    @property
    def alu(self) -> float:
        """Cycles in which the pipe of integers and logic is busy."""
        return 2 * sum(self.by_kind.get(kind, 0) for kind in _ALU) * self.warps / 4

    @property
    def fma(self) -> float:
        """Cycles in which the pipe of multiply-adds is busy."""
        count = sum(self.by_kind.get(kind, 0) for kind in _FMA) + 2 * self.by_kind.get("multiply_integer", 0)
        return count * self.warps / 4

    @property
    def waited_loads(self) -> int:
        """Loads from memory into registers, which are not fetched ahead."""
        return self.by_kind.get("load", 0)


def main_loop(listing: str, warps: int) -> LoopCost:
    """The loop with the most tensor core instructions; of equals, the longest.

    Args:
        listing: what nvdisasm -c prints of a kernel.
        warps: of a program.

    Returns:
        Its cost; nothing in a kernel without a loop.
    """
    kinds, labels, jumps = _read(listing)
    bodies = [kinds[labels[name] : at + 1] for at, name in jumps if labels.get(name, at + 1) <= at]
    if not bodies:
        return LoopCost(0, {}, warps)
    body = max(bodies, key=lambda kinds: (kinds.count("tensor"), len(kinds)))
    return LoopCost(len(body), dict(collections.Counter(body)), warps)


def _read(listing: str) -> tuple[list[str], dict[str, int], list[tuple[int, str]]]:
    """Kinds of all instructions, label -> index of the instruction behind it, and (index, label) of jumps."""
    kinds: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(kinds)
        found = _INSTRUCTION.search(line)
        if found is None:
            continue
        target = _TARGET.search(found[2])
        if found[1].startswith("BRA") and target:
            jumps.append((len(kinds), target[1]))
        kinds.append(next((kind for kind, rule in _RULES if rule.match(found[1])), "other"))
    return kinds, labels, jumps


def programs_together(registers: int, shared: int, warps: int, architecture: int) -> int:
    """Programs that share a multiprocessor, limited by registers, shared memory and warps.

    Args:
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.
        architecture: 90 for sm_90.
    """
    memory = {80: 164, 86: 100, 89: 100}.get(architecture, 228) * 1024
    most_warps = {86: 48, 89: 48}.get(architecture, 64)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, memory // (shared + 1024), most_warps // warps, 32)
