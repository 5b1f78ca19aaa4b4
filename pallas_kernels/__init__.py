"""Kernels for sparse convolutions: arrays in, arrays out.

Nothing here knows of pruning, Flax or Optax, and nothing but JAX, NumPy and jaxtyping must be
installed to import it.
"""
