"""Benchmarks and what they share: timing, environment, shapes."""
