"""Products with 2:4 weights, of which two in each four along the input axis are kept.

They run on sparse tensor cores where cuSPARSELt is installed.
"""

from pallas_kernels.two_of_four.api import choose, is_two_of_four, two_of_four_matmul
from pallas_kernels.two_of_four.cusparselt import unavailable

__all__ = ["choose", "is_two_of_four", "two_of_four_matmul", "unavailable"]
