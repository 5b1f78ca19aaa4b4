"""The convolution in plain XLA."""
