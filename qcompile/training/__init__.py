"""Training in low precision: prepare a model in place, optimize it, settle it to an ordinary quantized model."""
