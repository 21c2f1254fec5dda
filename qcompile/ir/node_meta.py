"""Keys of `node.meta` that this compiler writes, and what stands under each.

`meta["val"]`, the fake value, is torch's.
"""

WEIGHT = "qcompile_weight"
"""On a placeholder: the attribute path (str) of the weight that fills it."""

STATIC = "qcompile_static"
"""On a placeholder: True where the caller's tensor stays at one address between calls (mark_static_address)."""

DYNAMO_INDEX = "qcompile_dynamo_index"
"""On a placeholder: its place (int) among the inputs of the graph that Dynamo handed over."""

SITE = "qcompile_site"
"""On a quantized product: the name (str) of its site."""

FLOAT_WEIGHT = "qcompile_float_weight"
"""On a quantized product that a later pass corrects: the weight (Tensor [N, K]) before it was quantized."""

LOW_RANK = "qcompile_low_rank"
"""On a quantized product: factors of its low-rank correction, part -> weight name (dict[str, str])."""

LOW_RANK_STEP = "qcompile_low_rank_step"
"""On a product that trains through a low-rank parameter: what an optimizer's step is multiplied by (float), whether the
weight is rounded stochastically (bool), and the stream of its random values (int)."""

REPLACES_LAYER_NORM = "qcompile_replaces_layer_norm"
"""On an RMSNorm: the gain (str, attribute path) of the LayerNorm whose place it takes."""

WRITTEN = "qcompile_written"
"""On a value: True where an operator in place writes to its memory: it must be read where the model reads it."""

MODULE = "qcompile_module"
"""On a product of a captured module: the path (str) of the module that computes it and nothing else."""

NO_MODULE = "qcompile_no_module"
"""On a product of a captured module: why (str) no module computes it and nothing else."""
