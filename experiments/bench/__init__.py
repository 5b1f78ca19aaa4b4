"""Benchmarks, and the shapes and programs that they share.

Commands: `python -m experiments.bench.kernels`, `training`, `inference`, `parts`, `channel_blocks`
and `tune`. The first two and the last measure a GPU with `--device gpu`; `bash
experiments/bench/gpu.sh` runs everything that a GPU is measured with.
"""
