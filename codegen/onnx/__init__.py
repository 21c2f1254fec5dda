"""ONNX: quantized modules as ONNX Runtime's quantized operators; exported, checked and run."""
