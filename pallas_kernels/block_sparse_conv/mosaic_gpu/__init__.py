"""The convolution in Pallas on Mosaic GPU, for Hopper."""
