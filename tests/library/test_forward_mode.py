"""Forward mode: where it is not defined the error names what is, elsewhere the numbers agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import blocksparse_jax as bsj

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 16))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 16, 16))
LAYOUT = bsj.random_groups(jax.random.key(2), KERNEL.shape, group_size=8, kept=4, kept_taps=3)
WAY_OUT = r"forward mode alone .*jax\.grad.*jax\.jvp of jax\.grad.*implementation='dense'"


def convolution(**options):
    return lambda x: bsj.conv(x, KERNEL, LAYOUT, **options)


def repeated(f):
    def run(x):
        return jax.lax.scan(lambda carry, _: (f(carry), None), x, None, length=2)[0]

    return run


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,)),
    "jvp of scan": lambda f: jax.jvp(repeated(f), (X,), (X,)),
    "jvp of vmap": lambda f: jax.jvp(jax.vmap(f), (X[None],), (X[None],)),
    "jvp of remat": lambda f: jax.jvp(jax.checkpoint(f), (X,), (X,)),
    "jacfwd": lambda f: jax.jacfwd(lambda a: f(a * X))(1.0),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "linearize of jit": lambda f: jax.jit(jax.linearize(jax.jit(f), X)[1])(X),
}


@pytest.mark.parametrize("options", [{}, {"implementation": "xla"}, {"kernel_gradient": "dense"}])
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_alone_names_the_ways_that_work(mode, options):
    with pytest.raises(TypeError, match=WAY_OUT):
        FORWARD[mode](convolution(**options))


@pytest.mark.parametrize(
    ("mode", "kernel_gradient"), [*((mode, "masked") for mode in FORWARD), ("jit of jvp", "dense")]
)
def test_the_dense_implementation_has_forward_mode(mode, kernel_gradient):
    FORWARD[mode](convolution(implementation="dense", kernel_gradient=kernel_gradient))


@pytest.mark.parametrize("wrap", [jax.jit, repeated, jax.checkpoint])
def test_reverse_mode_passes_through_control_flow(wrap):
    def loss(x, kernel, implementation):
        f = wrap(lambda x: bsj.conv(x, kernel, LAYOUT, implementation=implementation))
        return jnp.sum(jnp.sin(f(x)))

    actual, expected = (
        jax.grad(loss, (0, 1))(X, KERNEL, implementation) for implementation in (None, "dense")
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


PACKED = bsj.pack(KERNEL, LAYOUT)
DENSE_LAYER = nn.Conv(16, (3, 3), use_bias=False)
NNX_LAYER = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
ROW_LAYOUT = bsj.get_layouts(
    bsj.hrbp_prune(0.5, group_size=8, where=lambda name, leaf: True).init({"kernel": KERNEL[0, 0]})
)["kernel"]


def in_use_layouts(x, kernel, **options):
    with bsj.linen.use_layouts({"kernel": LAYOUT}, **options):
        return DENSE_LAYER.apply({"params": {"kernel": kernel}}, x)


def in_nnx(x, kernel, **options):
    model = bsj.nnx.sparsify(nnx.clone(NNX_LAYER), **options)
    bsj.nnx.set_layouts(model, {"kernel": LAYOUT})
    model.kernel.set_value(kernel)
    return model(x)


PATHS = {
    "conv": (lambda x, kernel, **o: bsj.conv(x, kernel, LAYOUT, **o), KERNEL, X),
    "conv in CHWN": (
        lambda x, kernel, **o: bsj.conv(x, kernel, LAYOUT, data_format="CHWN", **o),
        KERNEL,
        X.transpose(3, 1, 2, 0),
    ),
    "a scale and a bias": (
        lambda x, kernel, **o: bsj.conv(
            x, kernel, LAYOUT, scale=kernel[0, 0, 0], bias=kernel[0, 0, 1], **o
        ),
        KERNEL,
        X,
    ),
    "linear": (lambda x, kernel, **o: bsj.linear(x, kernel, ROW_LAYOUT, **o), KERNEL[0, 0], X),
    "use_layouts": (in_use_layouts, KERNEL, X),
    "nnx": (in_nnx, KERNEL, X),
}
PACKED_PATHS = {f"packed, {name}": (PATHS[name][0], PACKED, X) for name in ("conv", "use_layouts")}


def hessian_vector_product(path, wrap=jax.jit, **options):
    f, kernel, x = (PATHS | PACKED_PATHS)[path]
    directions = jax.random.normal(jax.random.key(5), x.shape), jnp.cos(kernel)
    gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k, **options))), (0, 1))
    return wrap(lambda *args: jax.jvp(gradient, args, directions))(x, kernel)


@pytest.mark.parametrize("path", [*PATHS, *PACKED_PATHS])
def test_forward_over_reverse_agrees_with_the_dense_implementation(path):
    actual, expected = (
        hessian_vector_product(path, implementation=name) for name in (None, "dense")
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_forward_over_reverse_with_the_dense_gradient_names_what_works(path, wrap):
    way_out = r"forward mode over reverse .*kernel_gradient='masked' or implementation='dense'"
    with pytest.raises(TypeError, match=way_out):
        hessian_vector_product(path, wrap, kernel_gradient="dense")
    hessian_vector_product(path, wrap, kernel_gradient="dense", implementation="dense")


@pytest.mark.parametrize("path", PATHS)
def test_forward_mode_alone_is_refused_in_every_layer(path):
    f, kernel, x = PATHS[path]
    for kind in ("masked", "dense"):
        with pytest.raises(TypeError, match=WAY_OUT):
            jax.jvp(lambda x, kind=kind: f(x, kernel, kernel_gradient=kind), (x,), (x,))


def test_a_batch_of_gradients_and_a_jacobian():
    def loss(x, implementation):
        return jnp.sum(jnp.sin(bsj.conv(x[None], KERNEL, LAYOUT, implementation=implementation)))

    for derivative in (jax.vmap(jax.grad(loss), (0, None)), jax.jacrev(jax.vmap(loss, (0, None)))):
        actual, expected = derivative(X, None), derivative(X, "dense")
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
