"""Options of every registered method that fit a narrow network and a short run."""

import dataclasses

from experiments.training.registry import METHODS


def small_options(method, **changes):
    """The method's options with small groups and frequent updates; `changes` that it has no field
    for are left out.
    """
    options = METHODS[method].options
    small = {"group_size": 16, "block": 16, "update_every": 5} | changes
    fields = {field.name for field in dataclasses.fields(options)}
    return dataclasses.replace(options, **{k: v for k, v in small.items() if k in fields})


def fixes_sparsity(method):
    """Whether `--sparsity` has no say: the method's pattern or its threshold fixes it."""
    return METHODS[method].options.fixed_sparsity() is not None
