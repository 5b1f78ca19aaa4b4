"""Lets `flax.serialization` write an optimizer state that holds layouts.

Of a layout it writes the index arrays; everything static comes from the target that is restored.
Importing this module registers the types.
"""

import dataclasses
from typing import Any

from flax import serialization

from blocksparse_jax.layout import BlockLayout, ConsecutiveGroups, Dense, FilterGroups
from blocksparse_jax.spec import Spec

ARRAYS = {BlockLayout: ("filters", "channels", "taps"), FilterGroups: ("filters",)}
"""The array fields of each type of layout that has some."""
STATIC = (Dense, ConsecutiveGroups, Spec)
"""Types without arrays."""


def _state_dict(node: Any) -> dict[str, Any]:
    return {name: getattr(node, name) for name in ARRAYS[type(node)]}


def _restore(target: Any, state: dict[str, Any]) -> Any:
    arrays = {
        name: serialization.from_state_dict(getattr(target, name), state[name])
        for name in ARRAYS[type(target)]
    }
    return dataclasses.replace(target, **arrays)


for _type in ARRAYS:
    serialization.register_serialization_state(_type, _state_dict, _restore)
for _type in STATIC:
    serialization.register_serialization_state(_type, lambda node: {}, lambda target, state: target)
