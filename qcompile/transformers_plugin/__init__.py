"""Quantized models in transformers: `quantization_config=QCompileConfig(..)`, `save_pretrained`, `from_pretrained`."""
