"""CPU: quantized matmuls as operators of our own, so that Inductor fuses the rest around them.

cpu_kernel_choice.py        which kernel computes a site, and its measured speed (measured-*.json)
cpu_lowering.py             from the dialect to the operators
attention_rows.py           attention of few queries
short_attention.py          attention of all positions at once, where it was measured faster
gelu_rows.py                GELU and quantization in one
linear_weights.py           from a stored weight to the operands of its kernel, in the layout of weight_packing.py
native_kernels.py           the operators, compiled from native/
training_kernel_choice.py   the same for sites that train in fixed point; training_kernels.py rounds there
"""
