"""The optax transformations: one file for each family of methods."""
