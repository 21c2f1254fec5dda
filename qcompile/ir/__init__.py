"""The graph: `Program`, its frontends, its normal form, its operators and those that quantization adds."""
