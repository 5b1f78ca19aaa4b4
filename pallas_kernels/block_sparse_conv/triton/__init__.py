"""The convolution in Triton, for NVIDIA GPUs."""
