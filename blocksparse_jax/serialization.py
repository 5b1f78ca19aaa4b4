"""Lets `flax.serialization` write an optimizer state that holds layouts.

Of a layout it writes the index arrays; everything static comes from the target that is restored.
Plans are not written: a target that has one gets that of the restored arrays.
Importing this module registers the types.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import serialization

from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_check import validate
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Dense, FilterGroups
from blocksparse_jax.plans import with_plans
from blocksparse_jax.spec import Spec

ARRAYS = {
    BlockLayout: ("filters", "channels", "taps"),
    FilterGroups: ("filters",),
    ConsecutiveGroups: (),
}
"""The array fields of each type of layout that may hold some."""
STATIC = (Dense, Spec)
"""Types without arrays."""


def _state_dict(node: Any) -> dict[str, Any]:
    state = {name: getattr(node, name) for name in ARRAYS[type(node)]}
    if getattr(node, "packed", None) is not None:
        state["packed"] = serialization.to_state_dict(node.packed)
    return state


def _restore(target: Any, state: dict[str, Any]) -> Any:
    """The target with the arrays of a state; ValueError where they are no layout of its kernel."""
    arrays = {
        name: serialization.from_state_dict(getattr(target, name), state[name])
        for name in ARRAYS[type(target)]
    }
    packed = getattr(target, "packed", None)
    if (packed is None) == ("packed" in state):
        holds = "packed" if packed is None else "dense"
        raise ValueError(
            f"state: expected that of {'dense' if packed is None else 'packed'} values, as the "
            f"target's, got one of {holds} values; pack or unpack the target first"
        )
    if packed is not None:
        arrays["packed"] = serialization.from_state_dict(packed, state["packed"])
    restored = dataclasses.replace(target, **arrays)
    known = all(isinstance(array, np.ndarray | jax.Array) for array in arrays.values())
    if isinstance(restored, BlockLayout) and known:
        validate(restored)
        if restored.plan is not None:
            return with_plans(restored)
    return restored


for _type in ARRAYS:
    serialization.register_serialization_state(_type, _state_dict, _restore)
for _type in STATIC:
    serialization.register_serialization_state(_type, lambda node: {}, lambda target, state: target)
