"""What the inline assembler of a rendered kernel computes, evaluated on 32-bit words by numpy.

The interpreter runs the plain form of a kernel; a GPU runs these instructions.
"""

from __future__ import annotations

import re

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def assembler(source, function):
    """The assembler of a function of a rendered kernel."""
    found = re.search(rf'def {function}\(.*?inline_asm_elementwise\(\s*"(.*?)",', source, re.DOTALL)
    assert found is not None, function
    return found[1]


def evaluate(text, **operands):
    """The word in $0 of and, or, xor, lop3 (0xea, 0x6a), shr, shl, add and mad.lo; `operands` as r1 for $1."""
    values = {f"${name[1:]}": np.asarray(value).astype(np.uint64) & MASK for name, value in operands.items()}

    def read(word):
        return np.uint64(int(word, 0)) if word[0].isdigit() else values[word]

    for line in text.strip("{} ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        op, target, *sources = re.split(r"[ ,]+", line)
        a = [read(word) for word in sources]
        name = op.split(".")[0]
        if name == "mad":
            result = (a[0] * a[1] & MASK) + a[2]
        elif name == "lop3":
            assert int(a[3]) in (0xEA, 0x6A), "(a & b) | c, or (a & b) ^ c"
            result = (a[0] & a[1]) | a[2] if int(a[3]) == 0xEA else (a[0] & a[1]) ^ a[2]
        else:
            result = {
                "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add,
                "shr": np.right_shift, "shl": np.left_shift,
            }[name](*a)  # fmt: skip
        values[target] = result & MASK
    return values["$0"]
