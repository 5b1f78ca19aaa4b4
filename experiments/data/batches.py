"""The interface through which the trainer reads batches of any data set."""

from collections.abc import Iterator
from typing import Protocol

from jaxtyping import Array, Float, Int

from blocksparse_jax._checks import positive_int

TrainBatch = tuple[Float[Array, "n h w c"], Int[Array, " n"]]
TestBatch = tuple[Float[Array, "n h w c"], Int[Array, " n"], Float[Array, " n"]]


class Data(Protocol):
    """A data set as the trainer sees it, whether it sits on the device or streams from disk.

    With P processes (hosts), process p yields rows p, p + P, ... of every global batch;
    `jax.make_array_from_process_local_data` joins them. One process alone yields whole batches,
    and the batches are the same for any number of processes.
    """

    @property
    def name(self) -> str:
        """The name in `SPECS`."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(h, w, c)` of one image."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches in an epoch; `batch_size` counts the examples of all processes."""
        ...

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Yields shuffled, augmented, normalised batches, a pure function of (seed, epoch, step).

        A batch is `(images float32 NHWC, labels int32)`.
        """
        ...

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Yields every test example once as `(images, labels, weights)`.

        The last batch is padded; its padding rows have weight 0, all other rows weight 1.
        """
        ...


def count_steps(examples: int, batch_size: int, processes: int = 1) -> int:
    """Counts the full batches of a training set.

    Args:
      examples: size of the training set.
      batch_size: examples in a batch, over all processes.
      processes: number of processes (hosts) that share a batch.

    Returns:
      `examples // batch_size`; the last partial batch is dropped.

    Raises:
      ValueError: the batch size is not positive, larger than the training set, or not a multiple of
        the processes.

    Example:
      >>> count_steps(50_000, 128)
      390
    """
    if positive_int("batch_size", batch_size) > examples:
        raise ValueError(
            f"batch_size: expected at most the {examples} training examples, got {batch_size}; "
            f"lower it"
        )
    return examples // local_size(batch_size, processes) // processes


def local_size(batch_size: int, processes: int) -> int:
    """The rows of a batch that each process holds; ValueError unless they divide evenly."""
    if positive_int("batch_size", batch_size) % processes:
        raise ValueError(
            f"batch_size: expected a multiple of the {processes} processes that share a batch, got "
            f"{batch_size}"
        )
    return batch_size // processes


def step_range(start_step: int, steps: int) -> range:
    """The steps of an epoch from `start_step` on; ValueError unless 0 <= start_step <= steps."""
    if not 0 <= start_step <= steps:
        raise ValueError(
            f"start_step: expected 0 to the {steps} steps of an epoch, got {start_step}"
        )
    return range(start_step, steps)
