"""The convolution in native CPU kernels."""
