"""What a number becomes: formats, rounding, packing. Tensors only, no graph and no model."""
