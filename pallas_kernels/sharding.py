"""Functions of a batch that is sharded over devices: each device computes its own images.

XLA's partitioner cannot look into a native kernel, so it would gather the batch on every device.
Here a function declares that its images may be sharded and nothing else, and that a result without
images is a sum over them. How it says so depends on the axes of the mesh: for Auto axes by a rule
of the partitioner, for Explicit axes, which are part of the arrays' types, by a `shard_map`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.varying import vary_alike, varying_axes

IMAGES = "n"
"""The axis that may be sharded, in strings such as `"c h w n"`."""

CONVOLUTION = {
    "NHWC": ("n h w c", "kh kw c o", "n p q o"),
    "CHWN": ("c h w n", "kh kw c o", "o p q n"),
}
"""The axes of input, kernel and output of a convolution in a data format."""
Function = Callable[..., Any]
"""Takes arrays whose batch is the whole or a device's part, and returns one array, or a tuple."""
Results = str | tuple[str, ...]
"""The axes of one result, or of each."""


def over_images(
    function: Function, operands: Sequence[str], result: Results, *, xla: bool = False
) -> Function:
    """A function that runs where its images are.

    Args:
      function: takes arrays; the first one has images.
      operands: the axes of each array; `n` are the images, all others lie whole on every device.
      result: the axes of the result, or of each; one without `n` is a sum over the images.
      xla: whether the function is made of XLA's operations, which the partitioner knows.

    Returns:
      The function of whole arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> total = over_images(lambda x, w: w @ x.sum(1), ("c n", "o c"), "o")
      >>> total(jnp.ones((2, 5)), jnp.ones((3, 2))).tolist()
      [10.0, 10.0, 10.0]
    """

    def call(*arrays: jax.Array) -> Any:
        if jax.device_count() == 1 or varying_axes(arrays):  # the caller's own shard_map
            return function(*arrays)
        if mesh := _explicit_mesh(arrays):
            return _in_shard_map(function, operands, result, mesh)(*arrays)
        if xla:
            return function(*arrays)
        return _partitioned(function, operands, result)(*arrays)

    return call


def whole_but_images(operands: Sequence[str], arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Under Explicit axes, arrays that lie whole on every device, shared out by images alone.

    Args:
      operands: the axes of each array.
      arrays: the first one says over which axes of the mesh the images are shared out.

    Returns:
      The arrays; under Auto axes and on one device as they are.

    Raises:
      NotImplementedError: `jax.vmap` goes over an axis that lies on Explicit axes of the mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> whole_but_images(["c n"], [jnp.ones((2, 5))])[0].shape
      (2, 5)
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return tuple(arrays)
    if members := sorted(name for name in _explicit_axes(mesh) if not _is_free(mesh, name)):
        raise NotImplementedError(
            f"x: jax.vmap goes over an axis that is sharded over the Explicit mesh axes {members}, "
            "which no convolution here can follow; share it out around the vmap with "
            "jax.shard_map(jax.vmap(f), in_specs=..., out_specs=...)"
        )
    images = _mesh_axes(operands[0], jax.typeof(arrays[0]).sharding) or None
    return tuple(
        jax.sharding.reshard(array, NamedSharding(mesh, _layout(axes, images)))
        for axes, array in zip(operands, arrays)
    )


def _layout(axes: str, images: Any) -> PartitionSpec:
    """How an array lies on a mesh over whose axes `images` its images are shared out."""
    return PartitionSpec(*(images if axis == IMAGES else None for axis in axes.split()))


def _mesh_axes(axes: str, sharding: Any) -> tuple[str, ...]:
    """The mesh axes over which an array's images are shared out."""
    entry = sharding.spec[axes.split().index(IMAGES)]
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh of the arrays' types, if any of its axes is Explicit."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _explicit_axes(mesh: Any) -> set[Any]:
    """The names of a mesh's Explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def _is_free(mesh: Any, name: Any) -> bool:
    """Whether a `shard_map` may go over an axis of the mesh: no `jax.vmap` around goes over it."""
    whole = PartitionSpec()
    probe = jax.shard_map(
        lambda x: x, mesh=mesh, in_specs=whole, out_specs=whole, axis_names={name}
    )
    try:
        jax.eval_shape(probe, jax.ShapeDtypeStruct((), "float32"))
    except ValueError:
        return False
    return True


def _each(call: Callable[[str], Any], result: Results) -> Any:
    """Calls a function for the axes of one result, or of each."""
    return call(result) if isinstance(result, str) else tuple(map(call, result))


def _is_sum(axes: str) -> bool:
    """Whether a result is a sum over the images."""
    return IMAGES not in axes.split()


def _in_shard_map(
    function: Function, operands: Sequence[str], result: Results, mesh: Any
) -> Function:
    """The function under Explicit axes."""

    def call(*arrays: jax.Array) -> Any:
        arrays = whole_but_images(operands, arrays)
        names = _mesh_axes(operands[0], jax.typeof(arrays[0]).sharding)

        def summed(y: jax.Array, is_sum: bool) -> jax.Array:
            return lax.psum(y, tuple(varying_axes([y]))) if is_sum else y

        def on_device(*parts: jax.Array) -> Any:
            return jax.tree.map(summed, function(*vary_alike(parts)), _each(_is_sum, result))

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(_layout(axes, names or None) for axes in operands),
            out_specs=_each(lambda axes: _layout(axes, names or None), result),
            axis_names=_explicit_axes(mesh),
        )(*arrays)

    return call


def _partitioned(function: Function, operands: Sequence[str], result: Results) -> Function:
    """The function under Auto axes."""
    results = (result,) if isinstance(result, str) else result

    def names_of(mesh: Any, image: Any) -> tuple[str, ...]:
        if not isinstance(image.sharding, NamedSharding):
            return ()
        names = _mesh_axes(operands[0], image.sharding)
        size = image.shape[operands[0].split().index(IMAGES)]
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()

    def shardings(mesh: Any, names: Any, axes: Results) -> Any:
        return _each(lambda one: NamedSharding(mesh, _layout(one, names or None)), axes)

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        names = names_of(mesh, arguments[0])

        def summed(y: jax.Array, is_sum: bool) -> jax.Array:
            return lax.psum(y, names) if is_sum and names else y

        def on_device(*parts: jax.Array) -> Any:
            return jax.tree.map(summed, function(*parts), _each(_is_sum, result))

        of_operands = shardings(mesh, names, tuple(operands))
        return mesh, on_device, shardings(mesh, names, result), of_operands

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:
        return shardings(mesh, names_of(mesh, arguments[0]), result)

    whole = dict.fromkeys(" ".join((*operands, *results)).split())  # in the order of the rule
    del whole[IMAGES]
    partitioned = custom_partitioning(function)
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join(operands)} -> {', '.join(results)}",
        need_replication_factors=tuple(whole),
        reduction_factors=(IMAGES,) if all(map(_is_sum, results)) else (),
    )

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> Any:
        return partitioned(*arrays)

    @call.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        """Custom partitioning has no batched form."""
        axes = [0 if is_batched else None for is_batched in batched]
        return jax.vmap(function, axes, axis_size=size)(*arrays), _each(lambda _: True, result)

    return call
