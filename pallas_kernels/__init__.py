"""Kernels for sparse convolutions: arrays in, arrays out. Nothing here knows of pruning, Flax or
Optax.
"""
