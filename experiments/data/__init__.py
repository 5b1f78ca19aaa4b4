"""Data sets: specs, preparation, and batches."""

from experiments.data.resident import load

__all__ = ["load"]
