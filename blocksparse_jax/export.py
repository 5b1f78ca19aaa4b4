"""native_calls: what `jax.export` must be told to write programs with native kernels."""

from jax import export

from pallas_kernels.block_sparse_conv.cpu.kernels import TARGETS


def native_calls() -> list[export.DisabledSafetyCheck]:
    """The safety checks of `jax.export` that refuse the native kernels of this package.

    JAX writes a program to disk only if it knows that later versions will still run each of its
    calls, and it cannot know that of kernels from outside. Run the program with the version of this
    package that exported it.

    Returns:
      One check for each native kernel, for `jax.export.export(..., disabled_checks=...)`.

    Example:
      >>> import jax, jax.numpy as jnp, blocksparse_jax as bsj
      >>> kernel, x = jnp.ones((3, 3, 4, 8)), jnp.ones((2, 5, 5, 4))
      >>> layout = bsj.mask_to_layout(jnp.ones(kernel.shape, bool))
      >>> infer = jax.jit(lambda x: bsj.conv(x, kernel, layout))
      >>> exported = jax.export.export(infer, disabled_checks=native_calls())(x)
      >>> exported.call(x).shape
      (2, 5, 5, 8)
    """
    return [export.DisabledSafetyCheck.custom_call(name) for name in TARGETS.values()]
