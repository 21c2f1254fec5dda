"""The graph: `Program`, its two frontends, its normal form and the operators that quantization adds."""
