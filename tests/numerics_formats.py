"""The formats that tests of numerics run over."""

FORMATS = [
    "int8/row", "int8/tensor", "int8/row/zero", "int4/group16", "int4/group16/zero", "int4/group16/floatzero",
    "int4/group16/zero/dual", "int4/group16/dual", "int3/group32/zero", "int2/group8", "int2/row", "fp8/row",
    "fp8/tensor", "fp4/row", "fp4/group16", "fp4/group16/m1", "fp4/group16/m2", "fp4/group16/m1ceil",
    "fp4/group16/m2ceil",
]  # fmt: skip
