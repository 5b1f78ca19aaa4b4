"""`python -m pallas_kernels.two_of_four.build`: compiles the handler that calls cuSPARSELt.

It takes a C++17 compiler, cuSPARSELt's header (`pip install nvidia-cusparselt-cu13`; PyTorch's
CUDA wheels bring it) and those of CUDA's runtime (`pip install nvidia-cuda-runtime
nvidia-cuda-crt`, or an installed CUDA toolkit). It links nothing: cuSPARSELt is opened at run time.
"""

import argparse
import sys
from pathlib import Path

from pallas_kernels.two_of_four import handler


def main() -> int:
    """Compiles the handler and prints its path.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.two_of_four.build",
        description="Compiles the handler of cuSPARSELt.",
    )
    parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        help="a folder of headers; may be given several times",
    )
    try:
        print(handler.build(folders=parser.parse_args().include))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
