"""Benchmarks on a GPU, in units of which each is kept in a journal, so that a call can continue."""
