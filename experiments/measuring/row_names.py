"""Names in the rows of the reports: the benchmarks write them, the tables and figures read them."""

from pallas_kernels.block_sparse_conv import PASSES

PASS_NAMES = tuple(field.replace("_", " ") for field in PASSES)  # each pass of a convolution alone
TOGETHER = "forward + gradients"  # its three passes
CHOSEN = "chosen"  # the implementation that runs; also under its own name
MASKED = "masked dense"  # the convolution
TORCH = "PyTorch dense"  # the execution of a training step
