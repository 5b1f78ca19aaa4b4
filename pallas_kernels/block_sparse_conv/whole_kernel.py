"""The dense convolution in CHWN, by kernels for which everything is kept.

XLA's dense convolution on a CPU (jax 0.10) takes up to three times as long in its gradients as the
native kernels take with everything kept, and works in NHWC alone: it transposes CHWN activations.
Where images are of a few pixels, a matrix product for each tap skips the padding and is faster yet.

On a GPU cuDNN transposes them too, in float32 where the layer is a stem: a few input channels. In a
ResNet-50 step on an H200 the stem took a tenth of the time. The Triton kernels gather its rows, and
its lists are constants of the program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dense_conv
from pallas_kernels.block_sparse_conv import cpu, cpu_times
from pallas_kernels.block_sparse_conv.api import block_sparse_conv
from pallas_kernels.block_sparse_conv.arithmetic import HALF_DTYPES
from pallas_kernels.block_sparse_conv.choice import IMPLEMENTATIONS, reads_plans
from pallas_kernels.block_sparse_conv.cpu.launch import DTYPES
from pallas_kernels.block_sparse_conv.epilogue import apply_epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan, make_plan
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation

LARGEST_GROUP = 64
"""The most filters of a block: among 16 to 512, groups of 64 took the least time, measured on 2
cores of a CPU with AVX-512 at the sizes of VGG-19 and ResNet-32, batch 128."""
SMALLEST = 8
"""The fewest input channels of a layer that is no stem, and the fewest filters of a block."""
STEM_POSITIONS = 1 << 15
"""The fewest pixels, of all images together, for which the native kernels run a stem on a CPU; with
fewer, one matrix product is faster. Measured on one core with AVX-512, forward pass and weight
gradient: of 128 images of 32x32 pixels the kernels take 0.6 to 0.8 times as long, of 8 images 1.2
times."""
STEM = "triton"
"""What runs stems on a GPU."""
XLA_PIXELS = 16
"""The smallest output, in pixels, for which XLA's convolution is chosen: it takes 40 times as long
as the others at 2x2 pixels, and only a few images of these were measured."""
DENSE: dict[str, Callable[..., Array]] = {"xla": dense_conv.xla_conv, "taps": dense_conv.tap_conv}
"""The formulations beside the native kernels."""


def whole_kernel_implementation(
    x: Any, kernel_shape: Sequence[int], implementation: str | None, **geometry: Any
) -> Implementation | None:
    """What runs a dense convolution in CHWN, if it is not XLA.

    - On a CPU the native kernels (see `runs_whole_kernels`), where no implementation is named.
    - On a GPU the Triton kernels, for stems in 16 bits, where the block-sparse layers are theirs
      too: kernels larger than 1x1 of fewer than 8 input channels and a multiple of 16 filters.

    Args:
      x: the activations `[cin, h, w, n]`, or anything with their shape and dtype.
      kernel_shape: `(kh, kw, cin, cout)`.
      implementation: what the caller names for the block-sparse layers, or None.
      **geometry: strides, padding and dilation, as in `block_sparse_conv`.

    Returns:
      The implementation for `whole_kernel_conv`, or None.

    Example:
      >>> import jax
      >>> x = jax.ShapeDtypeStruct((3, 8, 8, 2), jnp.bfloat16)
      >>> whole_kernel_implementation(x, (3, 3, 3, 16), "xla") is None
      True
    """
    if implementation is None and runs_whole_kernels(x, kernel_shape):
        return _FASTEST
    kh, kw, cin, cout = kernel_shape
    is_stem = kh * kw > 1 and cin < SMALLEST and cout % (2 * SMALLEST) == 0
    is_half = jnp.dtype(x.dtype).name in HALF_DTYPES
    if not (is_stem and is_half and _has_values(x) and reads_plans(implementation)):
        return None
    groups, group_size = _blocks(cout)
    spec = ConvSpec(
        cin=cin,
        height=x.shape[1],
        width=x.shape[2],
        batch=x.shape[3],
        kernel=(kh, kw),
        cout=cout,
        groups=groups,
        kept=cin,
        kept_taps=kh * kw,
        group_size=group_size,
        dtype=jnp.dtype(x.dtype).name,
        **geometry,
    )
    record = IMPLEMENTATIONS[STEM]
    return record if record.supports(spec) is None else None


def runs_whole_kernels(x: Any, kernel_shape: Sequence[int]) -> bool:
    """Whether the native kernels run a dense convolution in CHWN.

    They do on a CPU that has the native kernels, for kernels larger than 1x1 (which are one matrix
    product) of a multiple of 8 filters, and of at least 8 input channels or, for stems,
    `STEM_POSITIONS` pixels.

    Args:
      x: the activations `[cin, h, w, n]`, or anything with their shape and dtype.
      kernel_shape: `(kh, kw, cin, cout)`.

    Returns:
      A bool.

    Example:
      >>> import jax
      >>> runs_whole_kernels(jax.ShapeDtypeStruct((3, 8, 8, 2), jnp.float32), (3, 3, 3, 16))
      False
    """
    kh, kw, cin, cout = kernel_shape
    return (
        kh * kw > 1
        and cout % SMALLEST == 0
        and jnp.dtype(x.dtype).name in DTYPES
        and _has_values(x)
        and (cin >= SMALLEST or math.prod(x.shape[1:]) >= STEM_POSITIONS)
        and cpu.unavailable() is None
    )


def whole_kernel_conv(
    x: Float[Array, "cin h w n"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    implementation: Implementation | None = None,
    **options: Any,
) -> Float[Array, "cout ho wo n"]:
    """Convolves with every weight of a conv kernel.

    Args:
      x: activations.
      kernel: the whole kernel.
      implementation: what `whole_kernel_implementation` returned, or one of `by_formulation`;
        None: each pass runs as `fastest_formulation` says.
      **options: strides, padding, dilation, the epilogue and precision, as in `block_sparse_conv`.

    Returns:
      Activations in the dtype of x.

    Example:
      >>> x, kernel = jnp.ones((8, 3, 3, 2)), jnp.ones((3, 3, 8, 8))
      >>> float(whole_kernel_conv(x, kernel)[0, 0, 0, 0])
      72.0
    """
    kh, kw, cin, cout = kernel.shape
    groups, group_size = _blocks(cout)
    index = Index(
        filters=jnp.arange(cout).reshape(groups, group_size),
        channels=_every(groups, cin),
        taps=_every(groups, math.prod((kh, kw))),
    )
    implementation = _FASTEST if implementation is None else implementation
    return block_sparse_conv(
        x,
        _packed(kernel, groups),
        *index,
        kernel_shape=(kh, kw, cin, cout),
        implementation=implementation,
        plan=_constant_plan((kh, kw, cin, cout), groups) if implementation.plans else None,
        **options,
    )


@functools.lru_cache(maxsize=4096)
def fastest_formulation(spec: ConvSpec, pass_name: str) -> str:
    """What runs a pass of a whole kernel: the fastest by the measured times nearby.

    They were measured in float32; in bfloat16, which XLA widens, the native kernels run.

    Args:
      spec: the static sizes of the whole kernel.
      pass_name: one of `PASSES`.

    Returns:
      "cpu", the native kernels, or a key of `DENSE`.

    Example:
      >>> spec = ConvSpec(cin=64, height=32, width=32, batch=128, kernel=(3, 3), cout=64, groups=1,
      ...                 kept=64, kept_taps=9, group_size=64, padding=((1, 1), (1, 1)))
      >>> fastest_formulation(spec, "weight_gradient")
      'cpu'
    """
    if spec.dtype != "float32":
        return cpu_times.NATIVE
    entries = cpu_times.read(cpu_times.WHOLE)["entries"]
    times = [entry["milliseconds"][pass_name] for entry in entries]
    loss = cpu_times.losses(times, cpu_times.weights(spec, cpu_times.WHOLE))
    if math.prod(spec.out_size) < XLA_PIXELS:
        del loss["xla"]
    return min(loss, key=loss.__getitem__)


@functools.cache
def by_formulation(formulation: str | None) -> Implementation:
    """The passes of a whole kernel, run by one formulation.

    Args:
      formulation: "cpu" or a key of `DENSE`; None: for each pass the fastest.

    Returns:
      The implementation; for packed values of a whole kernel in its own order only.

    Example:
      >>> by_formulation("taps").name
      'taps'
    """

    def chosen(spec: ConvSpec, pass_name: str) -> str:
        return formulation or fastest_formulation(spec, pass_name)

    def forward(spec: ConvSpec, x: Array, values: Array, *index_and_epilogue: Any) -> Array:
        name = chosen(spec, "forward")
        if name == cpu_times.NATIVE:
            return cpu.IMPLEMENTATION.forward(spec, x, values, *index_and_epilogue)
        y = _dense(spec, name, x, _unpacked(values, spec))
        scale, bias, residual = index_and_epilogue[3:]
        return apply_epilogue(y, scale, bias, residual, spec.relu)

    def input_gradient(spec: ConvSpec, dy: Array, values: Array, *index: Array) -> Array:
        name = chosen(spec, "input_gradient")
        if name == cpu_times.NATIVE:
            return cpu.IMPLEMENTATION.input_gradient(spec, dy, values, *index)
        kernel = _unpacked(values, spec)
        x = jax.ShapeDtypeStruct(spec.in_shape, dy.dtype)
        return jax.linear_transpose(lambda x: _dense(spec, name, x, kernel), x)(dy)[0]

    def weight_gradient(spec: ConvSpec, x: Array, dy: Array, *index: Array) -> Array:
        name = chosen(spec, "weight_gradient")
        if name == cpu_times.NATIVE:
            return cpu.IMPLEMENTATION.weight_gradient(spec, x, dy, *index)
        kernel = jax.ShapeDtypeStruct(spec.kernel_shape, dy.dtype)
        gradient = jax.linear_transpose(lambda kernel: _dense(spec, name, x, kernel), kernel)(dy)
        return _packed(gradient[0], spec.groups).astype(jnp.float32)

    name = formulation or "fastest"
    supports = cpu.IMPLEMENTATION.supports
    return Implementation(name, supports, forward, input_gradient, weight_gradient, fused=True)


def _dense(spec: ConvSpec, name: str, x: Array, kernel: Array) -> Array:
    geometry = spec.strides, spec.padding, spec.dilation
    return DENSE[name](x, kernel, *geometry, "CHWN", precision=spec.precision)


def _packed(kernel: Array, groups: int) -> Array:
    """`[kh, kw, cin, cout]` as packed values `[groups, cin, kh * kw, cout / groups]`."""
    kh, kw, cin, cout = kernel.shape
    return kernel.reshape(kh * kw, cin, groups, cout // groups).transpose(2, 1, 0, 3)


def _unpacked(values: Array, spec: ConvSpec) -> Array:
    """The inverse of `_packed`."""
    return values.transpose(2, 1, 0, 3).reshape(spec.kernel_shape)


def _has_values(x: Any) -> bool:
    """Whether all sizes are known, and none is 0."""
    return all(isinstance(size, int) and size > 0 for size in x.shape)


def _blocks(cout: int) -> tuple[int, int]:
    """The groups that the filters fall into, and the filters of each."""
    group_size = next(size for size in range(min(LARGEST_GROUP, cout), 0, -1) if not cout % size)
    return cout // group_size, group_size


def _constant_plan(kernel_shape: tuple[int, int, int, int], groups: int) -> Plan:
    """The plan of a whole kernel, made while the program is traced: lists that are constants."""
    kh, kw, cin, cout = kernel_shape
    with jax.ensure_compile_time_eval():
        filters = jnp.arange(cout).reshape(groups, -1)
        index = Index(filters, _every(groups, cin), _every(groups, kh * kw))
        return jax.jit(make_plan, static_argnames="kernel_shape")(index, kernel_shape=kernel_shape)


def _every(groups: int, count: int) -> jax.Array:
    """`[groups, count]`: all indices below `count`, for each group."""
    return jnp.broadcast_to(jnp.arange(count), (groups, count))


_FASTEST = by_formulation(None)
