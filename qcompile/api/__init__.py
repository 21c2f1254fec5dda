"""The functions that users call on a model: quantize, export_onnx, verify_model."""
