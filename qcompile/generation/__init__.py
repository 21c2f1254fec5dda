"""Running a model: loading it, sampling from it, sessions of ONNX Runtime."""
