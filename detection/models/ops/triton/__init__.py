"""Kernels for GPUs. Importing a module of this package needs Triton, which comes with PyTorch's CUDA builds."""
