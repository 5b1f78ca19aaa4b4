"""Packing whole training states: what belongs to a packed parameter is converted, nothing else."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blocksparse_jax as bsj

SHAPE = (3, 3, 16, 32)


def only(layer):
    return lambda name, leaf: name == f"{layer}/kernel"


def pruned(tx, params):
    """Params with zeros where pruned, and a state after one step, whose moments are not zero."""
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture
def layers(params):
    """Two conv layers of one shape with other weights: the shape does not tell them apart."""
    return params | {"conv2": {"kernel": params["conv1"]["kernel"][:, :, ::-1]}}


def assert_same(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def test_each_of_two_methods_keeps_the_masks_of_its_own_leaves(layers):
    """One method prunes conv1, the other conv2; each has the scalar True where the other prunes,
    and has it again after packing and unpacking.
    """
    tx = bsj.sparse(
        bsj.hrbp_prune(0.75, group_size=16, where=only("conv1")),
        bsj.hrbp_prune(0.5, group_size=8, block_density=1.0, where=only("conv2")),
        optax.adam(1e-2),
    )
    params, state = pruned(tx, layers)
    layouts = bsj.get_layouts(state)
    values, packed = bsj.pack_tree(params, state, layouts)
    for name in ("conv1", "conv2"):
        assert values[name]["kernel"].shape == layouts[name]["kernel"].packed_shape
    for method in packed[:2]:
        assert all(mask.ndim == 0 for mask in jax.tree.leaves(method.masks))
    back = bsj.unpack_tree(values, packed, layouts)
    assert_same(back, (params, state))
    first, second = back[1][:2]
    assert first.masks["conv2"]["kernel"].ndim == second.masks["conv1"]["kernel"].ndim == 0


def test_a_method_behind_multi_transform_keeps_its_masks(layers):
    labels = {"stem": "plain", "conv1": "sparse", "conv2": "plain", "classifier": "plain"}
    inner = bsj.sparse(bsj.hrbp_prune(0.75, group_size=16), optax.adam(1e-2))
    tx = optax.multi_transform({"sparse": inner, "plain": optax.sgd(0.1, momentum=0.9)}, labels)
    params, state = pruned(tx, layers)
    layouts = bsj.get_layouts(state)
    assert layouts["conv2"] == {"kernel": bsj.Dense()}
    values, packed = bsj.pack_tree(params, state, layouts)
    assert values["conv2"]["kernel"].shape == SHAPE
    assert_same(bsj.unpack_tree(values, packed, layouts), (params, state))


class NoiseState(NamedTuple):
    noise: Any
    by_name: Any


def with_arrays_of_its_own(shape):
    """A transformation whose state has arrays of a kernel's shape that belong to no parameter."""

    def init(params):
        del params
        noise = jax.random.normal(jax.random.key(5), shape)
        return NoiseState(noise, {"conv1": {"scale": noise}, "kernel": noise, "other": [noise]})

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


@pytest.mark.parametrize("packed_form", [False, True])
def test_arrays_that_belong_to_no_parameter_stay(layers, packed_form):
    """Whatever their shape: that of the kernel, or that of its packed values."""
    method = bsj.hrbp_prune(0.75, group_size=16, where=only("conv1"))
    layout = bsj.get_layouts(method.init(layers))["conv1"]["kernel"]
    shape = layout.packed_shape if packed_form else layout.shape
    tx = bsj.sparse(method, with_arrays_of_its_own(shape), optax.adam(1e-2))
    params, state = pruned(tx, layers)
    noise = state[1]
    assert np.all(noise.noise != 0), "keep_zeros does not mask them either"
    layouts = bsj.get_layouts(state)
    values, packed = bsj.pack_tree(params, state, layouts)
    assert_same(packed[1], noise)
    moments = packed[2][0].mu
    assert moments["conv1"]["kernel"].shape == layout.packed_shape
    assert moments["conv2"]["kernel"].shape == SHAPE
    assert_same(bsj.unpack_tree(values, packed, layouts), (params, state))


def test_state_of_another_shape_than_its_parameter_stays(layers):
    """Adafactor keeps a row and a column of each second moment under the parameter's name."""
    tx = bsj.sparse(
        bsj.hrbp_prune(0.75, group_size=16),
        optax.scale_by_factored_rms(min_dim_size_to_factor=16),
    )
    params, state = pruned(tx, layers)
    rows = state[1].v_row
    assert rows["conv1"]["kernel"].shape == (3, 3, 16)
    layouts = bsj.get_layouts(state)
    with pytest.warns(
        UserWarning, match=r"shape \(3, 3, \d+\) belongs to 'conv1/kernel', which is"
    ):
        values, packed = bsj.pack_tree(params, state, layouts)
    assert_same(packed[1], state[1])
    assert_same(bsj.unpack_tree(values, packed, layouts), (params, state))


def test_a_leaf_that_is_not_packed_keeps_its_mask(layers):
    """The layouts of one of two pruned layers: only that one is packed, the other trains on."""
    tx = bsj.sparse(bsj.hrbp_prune(0.75, group_size=16), optax.adam(1e-2))
    params, state = pruned(tx, layers)
    layouts = bsj.get_layouts(state)
    layouts["conv2"]["kernel"] = bsj.Dense()
    values, packed = bsj.pack_tree(params, state, layouts)
    masks = bsj.get_masks(packed)
    assert masks["conv1"]["kernel"].ndim == 0
    np.testing.assert_array_equal(masks["conv2"]["kernel"], bsj.get_masks(state)["conv2"]["kernel"])
    updates, after = tx.update(jax.tree.map(jnp.ones_like, values), packed, values)
    assert_same(bsj.get_masks(after), masks)
    kept = np.asarray(masks["conv2"]["kernel"])
    assert not np.any(np.asarray(optax.apply_updates(values, updates)["conv2"]["kernel"])[~kept])
    assert_same(bsj.unpack_tree(values, packed, layouts), (params, state))


def test_moments_are_packed_with_the_values_of_their_own_layer(layers):
    """Equal shapes, different layouts: each moment goes through the layout of its parameter."""
    tx = bsj.sparse(bsj.hrbp_prune(0.75, group_size=16), optax.trace(0.9), optax.scale(-0.1))
    params, state = pruned(tx, layers)
    numbered = jax.tree.map(
        lambda p: jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape), params
    )
    numbered = bsj.apply_masks(numbered, bsj.get_masks(state))
    state = (state[0], state[1]._replace(trace=numbered), *state[2:])
    layouts = bsj.get_layouts(state)
    first, second = (layouts[name]["kernel"] for name in ("conv1", "conv2"))
    assert not np.array_equal(first.channels, second.channels)
    values, packed = bsj.pack_tree(numbered, state, layouts)
    assert_same(packed[1].trace, values)
    for name in ("conv1", "conv2"):
        index = np.asarray(values[name]["kernel"], int).reshape(-1)
        flat = np.asarray(numbered[name]["kernel"]).reshape(-1)
        np.testing.assert_array_equal(flat[index], index)
        assert set(index) | {0} == set(flat.astype(int))
