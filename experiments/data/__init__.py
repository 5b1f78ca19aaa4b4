"""Data sets: what they are, how they are prepared, and how they give batches.

`load("digits")` needs no files and imports neither tensorflow-datasets nor OpenCV.
"""

from experiments.data.loading import load

__all__ = ["load"]
