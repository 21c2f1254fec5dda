"""CPU: quantized matmuls as operators of our own, so that Inductor fuses the rest around them.

cpu_kernel_choice.py   which kernel computes a site, and its measured speed (measured-*.json)
traced_kernels.py      the kernels as the compiler sees them
native_kernels.py      the operators behind them, compiled from native_kernels.cpp
cpu_lowering.py        from the dialect to these
"""
