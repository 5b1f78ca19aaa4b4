"""Products with 2:4 weights: two kept of each four along the input axis, on sparse tensor cores
where cuSPARSELt is there.
"""

from pallas_kernels.two_of_four.api import choose, is_two_of_four, two_of_four_matmul
from pallas_kernels.two_of_four.cusparselt import unavailable

__all__ = ["choose", "is_two_of_four", "two_of_four_matmul", "unavailable"]
