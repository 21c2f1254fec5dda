"""NVIDIA GPUs: Triton kernels, rendered from a typed description into plain source that can be read and kept.

Folders, each of which imports only those before it:

    kernels/   what a kernel computes (specs), its source (templates), which formats have one, how weights are packed
    launch/    kernels run on tensors: tiles, split-K, packed weights, what was measured on this GPU
    aot/       kernels compiled for GPUs that need not be there, and what they may cost
    tuning/    kernels timed on the GPU that is there, against each other and against baselines

The files beside them make a target of it, on top of kernels/ and launch/ and imported by neither:

    triton_ops.py          the kernels as operators of torch, with fake and CPU versions
    triton_op_calls.py     typed views of calls of these operators
    gpu_kernel_choice.py   which kernel computes a site, and how fast
    fuse_row_quant.py      what stands before a quantize, fused into it
    gpu_lowering.py        from the dialect to the operators
    gpu_rounding.py        what the operators that train round with
"""
