"""The index arrays of a block-sparse conv kernel."""

from typing import Any, NamedTuple


class Index(NamedTuple):
    """Which weights of a conv kernel `[kh, kw, cin, cout]` the packed values hold.

    The packed value `[g, k, t, i]` is the weight at tap `taps[g, t]`, input channel
    `channels[g, k]` and filter `filters[g, i]`.

    Attributes:
      filters: int32 `[groups, group_size]`, a partition of `range(cout)`.
      channels: int32 `[groups, kept]`, the input channels that each group keeps.
      taps: int32 `[groups, kept_taps]`, the kernel positions `y * kw + x` that each group keeps.

    Example:
      >>> import numpy as np
      >>> index = Index(np.array([[0, 1]]), np.array([[0, 2, 3]]), np.array([[4]]))
      >>> kernel = np.arange(9 * 4 * 2).reshape(9, 4, 2)
      >>> kernel[index.positions()].shape
      (1, 3, 1, 2)
    """

    filters: Any
    channels: Any
    taps: Any

    def positions(self) -> tuple[Any, Any, Any]:
        """Indices into a conv kernel reshaped to `[kh * kw, cin, cout]`.

        Returns:
          `(taps, channels, filters)`, arrays that broadcast to the packed shape `[groups, kept,
          kept_taps, group_size]`.
        """
        return (
            self.taps[:, None, :, None],
            self.channels[:, :, None, None],
            self.filters[:, None, None, :],
        )
