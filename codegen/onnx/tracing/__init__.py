"""What is traced for an export: modules made of ONNX Runtime's operators, and the signature of the file."""
