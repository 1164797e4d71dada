"""GPU kernels. Nothing here is imported before it is needed: kernels need triton, which is there only beside CUDA."""
