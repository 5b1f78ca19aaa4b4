"""Dense baselines in PyTorch on a CPU, which run in another process and another Python.

PyTorch is the strongest dense baseline on a CPU that we know, and no dependency of this project.
The benchmarks take the path of a Python that has it (and NumPy), in an environment of its own:

    python3 -m venv torchenv && torchenv/bin/python -m pip install torch numpy
    python -m experiments.bench.kernels --torch torchenv/bin/python

`process.py` is our end. `server.py` and the jobs beside it run in the other Python, so they import
nothing but PyTorch, NumPy and each other.
"""
