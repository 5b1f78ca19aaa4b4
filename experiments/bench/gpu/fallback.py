"""An implementation that serves every layer of a network, and the record of who served which."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels.block_sparse_conv import (
    NORM_PASSES,
    PASSES,
    ConvSpec,
    Implementation,
    Plan,
    apply_epilogue,
    choice,
    norm_passes,
)


class Fallback:
    """Serves a layer by the named implementation if that can, else by triton, else by dense.

    Args:
      name: of the implementation that is wanted.

    Attributes:
      name: what the fallback is called.
      specs: the convolutions that were traced, and the implementation that serves each.
      refused: for each layer that the named implementation refuses, who serves it and why.

    Example:
      >>> with Fallback("xla").registered() as name:
      ...     choice.available_implementations()[name] is None
      True
    """

    def __init__(self, name: str):
        self.name = f"{name} or what serves"
        names = dict.fromkeys((name, "triton", "dense"))
        self._records = [choice.IMPLEMENTATIONS[one] for one in names]
        self._server: dict[str, str] = {}  # by layer
        self.specs: dict[ConvSpec, Implementation] = {}
        self.refused: dict[str, str] = {}

    def layers(self) -> dict[str, int]:
        """Returns how many of the traced layers each implementation serves."""
        return dict(collections.Counter(self._server.values()))

    @contextlib.contextmanager
    def registered(self) -> Iterator[str]:
        """Registers the fallback for a while.

        Yields:
          The name under which `implementation=` takes it.
        """
        fuses_norms = self._records[0].fuses_norms
        choice.IMPLEMENTATIONS[self.name] = Implementation(
            self.name,
            lambda spec: None,
            self._forward,
            self._input_gradient,
            self._weight_gradient,
            fused=True,
            plans=(*PASSES, *NORM_PASSES),
            forward_with_sums=self._forward_with_sums if fuses_norms else None,
            norm_input_gradient=self._norm_input_gradient if fuses_norms else None,
            normalises=self._normalises if fuses_norms else None,
        )
        try:
            yield self.name
        finally:
            del choice.IMPLEMENTATIONS[self.name]

    def _serve(self, spec: ConvSpec) -> Implementation:
        """The implementation that serves a convolution; keeps a record of it."""
        kernel = "x".join(map(str, spec.kernel))
        sizes = f"{spec.cin}-{spec.cout}@{spec.height}"
        layer = f"{sizes} {kernel}/{spec.strides[0]} {spec.packed_shape}"
        reasons = {record.name: record.supports(spec) for record in self._records}
        server = next(record for record in self._records if reasons[record.name] is None)
        self._server[layer] = server.name
        self.specs[dataclasses.replace(spec, gradients=False, relu=False)] = server
        if server is not self._records[0]:
            self.refused[layer] = f"{server.name}: {reasons[self._records[0].name]}"
        return server

    def _forward(
        self, spec: ConvSpec, *operands: jax.Array | None, plan: Plan | None = None
    ) -> jax.Array:
        record = self._serve(spec)
        if record.fused:
            return record.run("forward", spec, *operands, plan=plan)
        y = record.run("forward", spec, *operands[:5], plan=plan)
        return apply_epilogue(y, *operands[5:], relu=spec.relu)

    def _input_gradient(
        self, spec: ConvSpec, *operands: jax.Array, plan: Plan | None = None
    ) -> jax.Array:
        return self._serve(spec).run("input_gradient", spec, *operands, plan=plan)

    def _weight_gradient(
        self, spec: ConvSpec, *operands: jax.Array, plan: Plan | None = None
    ) -> jax.Array:
        return self._serve(spec).run("weight_gradient", spec, *operands, plan=plan)

    def _forward_with_sums(
        self, spec: ConvSpec, *operands: jax.Array, plan: Plan | None = None
    ) -> tuple[jax.Array, ...]:
        record = self._serve(spec)
        if record.fuses_norms:
            return tuple(record.run("forward_with_sums", spec, *operands, plan=plan))
        return norm_passes.forward_with_sums(record.forward, spec, *operands)

    def _normalises(self, spec: ConvSpec) -> bool:
        record = self._serve(spec)
        return record.normalises is not None and record.normalises(spec)

    def _norm_input_gradient(
        self, spec: ConvSpec, *operands: jax.Array, plan: Plan | None = None
    ) -> tuple[jax.Array, ...]:
        record = self._serve(spec)
        if record.fuses_norms:
            return tuple(record.run("norm_input_gradient", spec, *operands, plan=plan))
        return norm_passes.norm_input_gradient(record.input_gradient, spec, *operands)
