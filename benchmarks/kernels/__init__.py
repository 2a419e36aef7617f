"""The CUDA kernels beside their peers."""
