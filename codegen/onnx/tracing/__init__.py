"""What is traced for an export: modules of ONNX Runtime's operators, wrapped to the signature of the file."""
