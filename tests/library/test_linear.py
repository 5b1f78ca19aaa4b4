"""linear: values and gradients of the product with the masked kernel."""

import functools
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from new_process import host_devices, run_python
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from blocksparse_jax._layer_forward import multiply

CIN, COUT = 12, 16
IMPLEMENTATIONS = [
    name
    for name, reason in bsj.available_implementations().items()
    if reason is None and name in ("xla", "cpu", "dense")
]


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def case(dtype=jnp.float32):
    """A kernel, its layout and its mask."""
    kernel = normal(0, (CIN, COUT), dtype)
    layout = bsj.layouts_from_scores(
        jnp.abs(kernel), 0.5, pattern=bsj.patterns.block(4), where=lambda name, leaf: True
    )
    return kernel, layout, bsj.layout_to_mask(layout)


def gradients(function, *operands):
    """The output, and the gradients under a fixed cotangent."""
    y, pullback = jax.vjp(jax.jit(function), *operands)
    return y, *pullback(normal(9, y.shape, y.dtype))


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max(initial=0))
        )


ROWS = [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)]


@pytest.mark.parametrize(
    ("rows", "form", "activation"),
    [
        slow_unless((i + j + k) % 2 == 0, rows, form, activation, id=f"{rows}-{form}-{activation}")
        for i, rows in enumerate(ROWS)
        for j, form in enumerate(["kernel", "packed", "full gradient"])
        for k, activation in enumerate([None, "relu"])
    ],
)
def test_linear_is_the_product_with_the_masked_kernel(rows, form, activation):
    kernel, layout, mask = case()
    x, bias = normal(1, (*rows, CIN)), normal(2, (COUT,))
    options = {"kernel_gradient": "dense"} if form == "full gradient" else {}

    def ours(x, kernel, bias):
        weights = bsj.pack(kernel, layout) if form == "packed" else kernel
        return bsj.linear(x, weights, layout, bias=bias, activation=activation, **options)

    def reference(x, kernel, bias):
        y = x @ kernel + bias
        return jax.nn.relu(y) if activation else y

    masked = jnp.where(mask, kernel, 0)
    y, dx, dkernel, dbias = gradients(reference, x, masked, bias)
    if form != "full gradient":
        dkernel = jnp.where(mask, dkernel, 0)
    assert_close(gradients(ours, x, kernel, bias), (y, dx, dkernel, dbias))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_implementation_and_dtype(implementation, dtype):
    kernel, layout, mask = case(dtype)
    x = normal(1, (6, 5, CIN), dtype)

    def ours(x, kernel):
        return bsj.linear(x, kernel, layout, implementation=implementation)

    def reference(x, kernel):
        kernel = jnp.where(mask, kernel, 0)
        return (x.astype(jnp.float32) @ kernel.astype(jnp.float32)).astype(dtype)

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_close(gradients(ours, x, kernel), gradients(reference, x, kernel), tolerance)


def test_a_dense_layout_multiplies_by_the_whole_kernel():
    kernel, x, bias = normal(0, (CIN, COUT)), normal(1, (3, 2, CIN)), normal(2, (COUT,))
    found = gradients(lambda *a: bsj.linear(a[0], a[1], bsj.Dense(), bias=a[2]), x, kernel, bias)
    assert_close(found, gradients(lambda x, w, b: x @ w + b, x, kernel, bias))


def test_linear_scans_over_stacked_layers():
    """`jax.vmap` of a method's init stacks dense kernels, layouts and state alike."""
    method = bsj.hrbp_prune(0.5, group_size=4, where=lambda name, leaf: True)
    kernels = normal(0, (3, CIN, CIN))
    state = jax.vmap(method.init)(kernels)
    layouts, x = bsj.get_layouts(state), normal(1, (4, CIN))
    masked = bsj.apply_masks(kernels, bsj.get_masks(state))
    assert float(bsj.get_masks(state).mean()) == 0.5
    values, _ = bsj.pack_tree(masked, None, layouts)
    assert values.shape == (3, *layouts.packed_shape)
    np.testing.assert_array_equal(bsj.unpack(values, layouts), masked)

    def layer(x, one):
        return jnp.tanh(bsj.linear(x, *one)), None

    expected = functools.reduce(lambda x, w: jnp.tanh(x @ w), masked, x)
    for weights in (masked, values):
        found = jax.lax.scan(layer, x, (weights, layouts))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_choose_implementation_answers_for_linear():
    _, layout, _ = case()
    pointwise = bsj.mask_to_layout(bsj.layout_to_mask(layout)[None, None], layout.filters)
    expected = bsj.choose_implementation(jnp.ones((6, 1, 1, CIN)), pointwise)
    assert bsj.choose_implementation(jnp.ones((2, 3, CIN)), layout) == expected
    empty = bsj.choose_implementation(jnp.ones((0, 3, CIN)), layout)
    assert empty.reason == "the batch is empty"


KERNEL, LAYOUT, _ = case()
CONV_LAYOUT = bsj.mask_to_layout(jnp.ones((1, 1, CIN, COUT), bool))
X = jnp.ones((3, CIN))
BAD = {
    "layout: expected that of a dense kernel .* call conv": lambda: bsj.linear(
        X, KERNEL, CONV_LAYOUT
    ),
    "layout: expected that of a conv kernel, .* call linear": lambda: bsj.conv(
        jnp.ones((1, 2, 2, CIN)), KERNEL[None, None], LAYOUT
    ),
    "layout: expected a BlockLayout or Dense": lambda: bsj.linear(X, KERNEL, None),
    r"x: expected 12 features in its last axis .* got shape \(3, 11\)": lambda: bsj.linear(
        X[:, 1:], KERNEL, LAYOUT
    ),
    r"x: expected 12 features .* got shape \(\)": lambda: bsj.linear(1.0, KERNEL, LAYOUT),
    "x: expected float32, bfloat16 or float16": lambda: bsj.linear(X.astype(int), KERNEL, LAYOUT),
    r"kernel: expected the conv kernel .* got \(1, 1, 11, 16\)": lambda: bsj.linear(
        X, KERNEL[1:], LAYOUT
    ),
    r"kernel: expected packed values .* got \(1, 1, 12, 16\)": lambda: bsj.linear(
        X, KERNEL[None, None], LAYOUT
    ),
    r"kernel: expected \[cin, cout\], .* got shape \(12, 16, 1\)": lambda: bsj.linear(
        X, KERNEL[..., None], LAYOUT
    ),
    r"kernel: expected \[cin, cout\], .* got shape \(1, 1, 12, 16\)": lambda: bsj.linear(
        X, KERNEL[None, None], bsj.Dense()
    ),
    "bias: ": lambda: bsj.linear(X, KERNEL, LAYOUT, bias=jnp.ones(3)),
    "activation: .*relu": lambda: bsj.linear(X, KERNEL, LAYOUT, activation="gelu"),
    "kernel_gradient: .*masked": lambda: bsj.linear(X, KERNEL, LAYOUT, kernel_gradient="full"),
    "kernel_gradient: .*'masked', 'dense'": lambda: bsj.linear(
        X, KERNEL, bsj.Dense(), kernel_gradient="full"
    ),
    "implementation: .*did you mean 'cpu'": lambda: bsj.linear(
        X, KERNEL, LAYOUT, implementation="cpus"
    ),
    "kernel_gradient: 'dense' needs the dense kernel": lambda: bsj.linear(
        X, bsj.pack(KERNEL, LAYOUT), LAYOUT, kernel_gradient="dense"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_the_forward_pass_of_layers_promotes_dtypes_and_names_the_layer():
    """As `nn.Dense`; the kernel's gradient keeps the kernel's own dtype."""
    kernel, layout, mask = case()
    x, bias = normal(1, (3, 2, CIN), jnp.bfloat16), normal(2, (COUT,))
    fields = {"implementation": None, "kernel_gradient": "masked", "precision": None}
    masked = {"kernel": jnp.where(mask, kernel, 0), "bias": bias}
    for dtype in (None, jnp.bfloat16):
        layer = types.SimpleNamespace(dtype=dtype, **fields)
        expected = nn.Dense(COUT, dtype=dtype).apply({"params": masked}, x)
        for weights, known in (
            (kernel, layout),
            (bsj.pack(kernel, layout), layout),
            (masked["kernel"], bsj.Dense()),
        ):
            found = multiply(layer, "mlp", x, weights, bias, known, kernel.shape)
            assert_close([found], [expected], 2e-2 if dtype else 1e-5)
    gradient = jax.grad(
        lambda w: multiply(layer, "mlp", x, w, bias, layout, w.shape).astype(jnp.float32).sum()
    )(kernel)
    assert gradient.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"mlp/kernel: its layout is of a kernel \(12, 16\)"):
        multiply(layer, "mlp", x, kernel.T, bias, layout, (COUT, CIN))
    with pytest.raises(ValueError, match=r"mlp/kernel: expected shape \(12, 16\) or packed"):
        multiply(layer, "mlp", x, kernel[1:], bias, layout, (CIN, COUT))
    with pytest.raises(ValueError, match=r"mlp/kernel: expected shape .* packed values need their"):
        multiply(layer, "mlp", x, kernel[1:], bias, bsj.Dense(), (CIN, COUT))


def test_a_sharded_batch_stays_sharded():
    done = run_python(__file__, **host_devices(4))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2


def check_sharded():
    """Values and gradients on four devices, and no all-gather in the compiled program."""
    kernel, layout, _ = case()
    x = normal(1, (8, 5, CIN))

    def loss(x, kernel, layout):
        return (bsj.linear(x, kernel, layout) ** 2).sum()

    f = jax.jit(jax.grad(loss, (0, 1)))
    expected = f(x, kernel, layout)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            found = f(placed, kernel, layout)
            assert_close(jax.device_get(found), expected)
            assert found[0].sharding.spec[0] == "data"
            assert "all-gather" not in f.lower(placed, kernel, layout).compile().as_text()
            print(kind, "agrees")


if __name__ == "__main__":
    sys.exit(check_sharded())
