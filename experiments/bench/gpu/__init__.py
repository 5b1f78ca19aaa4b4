"""Benchmarks on a GPU: resumable, in short stretches."""
