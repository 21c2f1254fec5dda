"""CPU: quantized sites in terms of what torch ships, so that Inductor fuses the rest around them."""
