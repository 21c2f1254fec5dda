"""Running a model: loading it, generating tokens, sessions of ONNX Runtime."""
