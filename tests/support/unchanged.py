"""Networks written with Flax's own layers, checked against their masked-dense selves."""

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj


def pruned(params, **options):
    """Masked params, the state of HRBP at 75% on them, and its layouts."""
    state = bsj.hrbp_prune(0.75, group_size=8, block_density=1, **options).init(params)
    return bsj.apply_masks(params, bsj.get_masks(state)), state, bsj.get_layouts(state)


def assert_linen_equals_masked_dense(model, x, tolerance=1e-5, where=None, **apply_options):
    """Values and gradients of a linen model, with and without layouts; returns what ran."""
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params, state, layouts = pruned(variables["params"], where=where)
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params, x):
        y = model.apply({"params": params, **others}, x, **apply_options)
        return (y.astype(jnp.float32) ** 2).mean(), y

    def sparse_loss(params, layouts, x):
        with bsj.linen.use_layouts(layouts) as executions:
            value = loss(params, x)
        ran.update(executions)
        return value

    ran: dict[str, str] = {}
    expected = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    run = jax.jit(jax.value_and_grad(sparse_loss, (0, 2), has_aux=True))
    actual = run(params, layouts, x)
    assert actual[0][1].dtype == expected[0][1].dtype
    if actual[0][1].dtype != jnp.float32 or params_are_rounded(params):
        tolerance = 3e-2
    masks = bsj.get_masks(state)
    for name, runs in ran.items():
        if runs == "block-sparse":
            gradient, mask = leaf(actual[1][0], name), leaf(masks, name)
            assert not np.any(np.where(mask, 0, gradient)), name
    for a, e in zip(*(kept_parts(tree, masks) for tree in (actual, expected)), strict=True):
        assert a.dtype == e.dtype
        scale = np.abs(np.asarray(e, float)).max() + 1e-30
        np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(e, float), atol=tolerance * scale, rtol=0
        )
    return ran


def kept_parts(result, masks):
    """The leaves of values and gradients, pruned parts of the gradients left out."""
    values, (grads, input_grads) = result
    return jax.tree.leaves((values, bsj.apply_masks(grads, masks), input_grads))


def leaf(tree, name):
    """The leaf of that name."""
    for key in name.split("/"):
        tree = tree[key]
    return tree


def params_are_rounded(params):
    """Whether any parameter has less than single precision."""
    return any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
