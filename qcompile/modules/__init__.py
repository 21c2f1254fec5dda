"""What stays in a user's model: quantized linears and experts, the key/value cache and its constants."""
