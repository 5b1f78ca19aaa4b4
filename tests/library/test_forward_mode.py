"""Forward mode: where it is not defined the error names what is, elsewhere the numbers agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_a_batch_of_gradients_and_a_jacobian():
    def loss(x, implementation):
        return jnp.sum(jnp.sin(bsj.conv(x[None], KERNEL, LAYOUT, implementation=implementation)))

    for derivative in (jax.vmap(jax.grad(loss), (0, None)), jax.jacrev(jax.vmap(loss, (0, None)))):
        actual, expected = derivative(X, None), derivative(X, "dense")
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
