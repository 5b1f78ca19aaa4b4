"""One training run from its config to its result: data, steps, rows of metrics, checkpoints."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj
from experiments.data import load
from experiments.data.batches import Data
from experiments.data.resident import Dataset, EpochRest
from experiments.measuring.timing import StepTimer, median_iqr
from experiments.training import network_size, plots, stopping
from experiments.training.checkpoints import Spill
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import (
    State,
    channels_of,
    checkpoint_like,
    dense_shapes,
    layouts_of,
    masks_of,
    to_form,
    with_masks,
)
from experiments.training.health import health, remarks
from experiments.training.history import History
from experiments.training.loop import Metrics
from experiments.training.optimizer import learning_rate, passes
from experiments.training.programs import Programs
from experiments.training.progress import Progress
from experiments.training.result import result_of
from experiments.training.run_folder import RunFolder
from experiments.training.seeding import first_batch, trainer_for
from experiments.training.stopping import Stopped, StopRequest


class Sums(NamedTuple):
    """Sums over the steps of a logging window or an epoch."""

    loss: float = 0.0
    correct: int = 0
    steps: int = 0


class Run:
    """One training run.

    Everything that can be wrong is found when it is made: the folder is locked and written, the
    data are open, a checkpoint is on the disk. `train` then does the work.

    Args:
      config: what to train; fields left at None take their preset.
      resume: go on with the run in the folder.
      data: the data set of the config, where it is loaded already.
      programs: of runs like this one, whose compiled steps serve here too.
      checkpoint_seconds: time between two checkpoints, of which one is kept; None writes them as
        the config says, and at each epoch's end.
      spill: a folder outside of the run's, for checkpoints above a number of bytes.
      pictures: whether to draw them at the end.

    Attributes:
      config: the resolved config.
      folder: the run folder.
      trainer: the steps.
      state: of the training, after `step` steps.
      step: steps done.
      seconds: of training, up to the last checkpoint, those before each resume included.
      result: as in result.json, once the run has ended; else None.

    Raises:
      ValueError: a field, the folder or a checkpoint is wrong; the message says which and what to
        do.
      FileNotFoundError: the data set is not prepared; the message holds the command.
      OSError: the folder cannot be written, or its disk is full.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume: bool = False,
        *,
        data: Data | None = None,
        programs: Programs | None = None,
        checkpoint_seconds: float | None = None,
        spill: Spill | None = None,
        pictures: bool = True,
    ):
        config = resolve(config)
        self.folder = RunFolder.open(config, resume)
        self.folder.checkpoints.spill = spill
        if checkpoint_seconds is not None:
            self.folder.checkpoints.keep = 1
        self._checkpoint_seconds, self._pictures = checkpoint_seconds, pictures
        self._given_data, self._programs = data, programs or Programs()
        try:
            self._open(self.folder.continued(config) if resume else config, resume)
        except BaseException:
            self.folder.discard()
            raise

    def _open(self, config: TrainConfig, resume: bool) -> None:
        self.config = config
        self.data = self._given_data or load(
            config.dataset,
            config.data_dir,
            examples=config.examples,
            workers=config.data_workers,
        )
        self.trainer = trainer_for(config, self.data)
        self._programs.share(self.trainer)
        self.length = self.trainer.length
        if (config.keep_checkpoint or 0) > self.length.total:
            raise ValueError(
                f"keep_checkpoint: expected a step up to {self.length.total}, the run's last, got "
                f"{config.keep_checkpoint}"
            )
        self.state: State = self.trainer.init(first_batch(config, self.data))
        self.step, self.seconds, self._since = 0, 0.0, time.perf_counter()
        self._parameters = network_size.parameters(dense_shapes(self.state))
        self._masks = masks_of(self.state)  # at the last epoch's end, for the SAD
        self._history = History(self.trainer, self.state, self.data.image_shape)
        self._window, self._epoch = Sums(), Sums()
        self._pending: list[Metrics] = []
        self._masks_to_test: list[Any] = []
        self._timer = StepTimer()
        last = self.folder.latest() if resume else None
        if last is not None:
            self._restore(last)
        ended = self.step == self.length.total
        self.result = self.folder.result() if ended else None
        if resume:  # what is wrong with the folder is found before `start` extends the run
            self.folder.rewind(self.step, config.log_every, self.length.steps_per_epoch)
        if last is not None and not ended:
            self.folder.checkpoints.check_space()
        self.folder.start(config)
        if last is None:
            self._save()
            self.folder.checkpoints.check_space()

    def _restore(self, step: int) -> None:
        meta = self.folder.checkpoints.meta(step)
        like = checkpoint_like(meta["form"], self.state, meta.get("channels"))
        self.state, self._masks, ever = self.folder.checkpoints.restore(step, like)
        self._history.restart(self.state, ever, flops=meta["flops"], steps=step)
        self._parameters = network_size.parameters(dense_shapes(self.state))
        self.step, self._window, self._epoch = step, Sums(*meta["window"]), Sums(*meta["epoch"])
        self.seconds = meta["seconds"]

    def _save(self) -> None:
        self._fetch()
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        meta = {
            "form": self.state.form,
            "channels": channels_of(self.state),
            "window": self._window,
            "epoch": self._epoch,
            "seconds": self.seconds,
            "flops": self._history.flops,
        }
        self.folder.save(self.step, (self.state, self._masks, self._history.ever), meta)

    def train(
        self, stop_after: int | None = None, *, deadline: float = math.inf
    ) -> dict[str, Any] | None:
        """Trains to the end, or for some steps.

        Args:
          stop_after: write a checkpoint and return after this many steps of the run; None trains to
            the end.
          deadline: of `time.monotonic()`; after it too, write a checkpoint and return.

        Returns:
          The result, as in result.json; None when it stopped before the end.

        Raises:
          Stopped: Ctrl-C or SIGTERM; the message says how to go on. After the first the step ends
            and a checkpoint is written, a second stops at once.
          FloatingPointError: the loss is not finite.
          OSError: the folder can no longer be written, or the data no longer be read.
        """
        self.folder.lock()
        try:
            if (self.folder.latest() or 0) > self.step:
                raise ValueError(
                    f"out: another process went on with the run in {self.folder.path}, beyond step "
                    f"{self.step}; make a new Run with resume=True"
                )
            self._deadline = deadline
            if self.result is None and not self._train(stop_after):
                return None
            self.result = self.result or self._finish()
            return self.result
        except Stopped:
            raise
        except KeyboardInterrupt as stop:
            message = f"stopped at once; {self._how_to_go_on()}"
            raise Stopped(message, stopping.number_of(stop)) from None
        finally:
            self.folder.close()

    def _train(self, stop_after: int | None) -> bool:
        """The steps; False where they stopped before the end."""
        total, self._since = self.length.total, time.perf_counter()
        with (
            Progress(self.config.method, total, self.step, self.config.batch_size) as progress,
            StopRequest(progress.stopping) as request,
        ):
            while self.step < total:
                self._train_epoch(progress, stop_after, request)
                if request.number is not None:
                    raise Stopped(f"stopped; {self._how_to_go_on()}", request.number)
                if self.step == stop_after:
                    return False
        return True

    def _how_to_go_on(self) -> str:
        at = f"step {self.folder.latest()} of {self.length.total}"
        return f"go on from {at} with: {self.folder.resume_command}"

    def _train_epoch(
        self, progress: Progress, stop_after: int | None, request: StopRequest
    ) -> None:
        """The rest of an epoch, or of the steps before a stop."""
        epoch = self.step // self.length.steps_per_epoch
        for _ in self._dispatches(stop_after):
            if self.step % self.config.log_every == 0:
                means = self._log_window(epoch)
                numbers = means["loss"], means["train_accuracy"], self._history.density
                progress.step(self.step, *numbers)
            ends = self.step % self.length.steps_per_epoch == 0
            if ends:
                progress.epoch(self.step, *self._log_epoch(epoch))
            stops = self.step == stop_after or time.monotonic() >= self._deadline
            if stops or request.number or self._checkpoint_is_due():
                self._save()
                stops = stops or request.number is not None
            if stops:
                return

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        if (every and self.step % every == 0) or self.step == self.config.keep_checkpoint:
            return True
        if self._checkpoint_seconds is None:
            return self.step % self.length.steps_per_epoch == 0
        late = time.perf_counter() - self._since >= self._checkpoint_seconds
        return late or self.step == self.length.total

    def _dispatches(self, stop_after: int | None) -> Iterator[None]:
        """Makes the rest of an epoch's steps, and yields after each dispatch."""
        epoch, done = divmod(self.step, self.length.steps_per_epoch)
        count = self.config.steps_per_dispatch
        where = epoch, self.config.batch_size, self.config.seed
        if count == 1 or not isinstance(self.data, Dataset):
            batches = self.data.train_batches(*where, start_step=done)
            for images, labels in _readable(batches):
                self._train_step(images, labels)
                yield
            return
        rest = self.data.train_rest(*where, start_step=done)
        while self.step // self.length.steps_per_epoch == epoch:
            if self._fit_together(count, stop_after):
                rest = self._train_steps(rest, count)
            else:
                batch, rest = rest.split()
                self._train_step(*batch)
            yield

    def _fit_together(self, count: int, stop_after: int | None) -> bool:
        """Whether nothing is to be done between the next steps."""
        config, first, last = self.config, self.step, self.step + count - 1
        intervals = config.log_every, config.checkpoint_every, self.length.steps_per_epoch
        stops = stop_after, config.keep_checkpoint
        return (
            all(first // n == last // n for n in intervals if n)
            and not any(first < step <= last for step in stops if step)
            and all(map(self.trainer.needs.plain, range(first, last + 1)))
        )

    def _train_steps(self, rest: EpochRest, count: int) -> EpochRest:
        def call() -> tuple[State, Metrics]:
            nonlocal rest
            state, metrics, rest = self.trainer.steps(self.state, rest, count)
            return state, metrics

        self._masks_to_test = []
        self._dispatch(call, count)
        return rest

    def _train_step(self, images: Any, labels: Any) -> None:
        step, state, trainer = self.step, self.state, self.trainer
        changes = trainer.needs.changes_masks(step) or trainer.needs.form(step + 1) != state.form
        if (step + 1) % self.length.steps_per_epoch == 0:
            self._masks_to_test = trainer.masks_to_test(step, state)
        self._dispatch(lambda: trainer.step(state, step, images, labels), 1, changes)
        if changes:
            self._parameters = network_size.parameters(dense_shapes(self.state))

    def _dispatch(
        self, call: Callable[[], tuple[State, Metrics]], count: int, changes: bool = False
    ) -> None:
        kind = self.state.form, self._parameters
        program = *kind, count, tuple(leaf.shape for leaf in jax.tree.leaves(self.state.layouts))
        self.state, metrics = self._timer.time(
            "topology" if changes else kind, program, call, count
        )
        self._pending.append(metrics)
        for step in range(self.step, self.step + count):
            self._history.step(step, self.state)
        self.step += count

    def _fetch(self) -> None:
        """Brings the metrics of the steps since the last call from the device, all at once."""
        self._timer.wait()
        for metrics in jax.device_get(self._pending):
            for loss, correct in zip(*map(np.atleast_1d, metrics), strict=True):
                self._window, self._epoch = (
                    Sums(s.loss + float(loss), s.correct + int(correct), s.steps + 1)
                    for s in (self._window, self._epoch)
                )
        self._pending.clear()
        self._history.fetch()
        if not math.isfinite(self._epoch.loss):
            raise FloatingPointError(
                f"the loss is {self._epoch.loss} at step {self.step}; lower --lr "
                f"({self.config.lr:g})"
            )

    def _log_window(self, epoch: int) -> dict[str, float]:
        """Writes the row of a logging window; its mean loss and accuracy."""
        self._fetch()
        means = self._means(self._window)
        row = {"kind": "train", "step": self.step, "epoch": epoch} | means | {"lr": self._lr()}
        self.folder.append(row)
        self._window = Sums()
        return means

    def _log_epoch(self, epoch: int) -> tuple[str, float]:
        """Writes the row of an epoch; its line on the console, and the test accuracy."""
        self._fetch()
        tested = with_masks(self._masks_to_test, self.state)
        masks, shapes = masks_of(tested), dense_shapes(tested)
        before = jax.tree.map(jnp.shape, self._masks)
        comparable = jax.tree.map(jnp.shape, masks) == before  # no channels were removed
        median, iqr = median_iqr(self._timer.milliseconds((self.state.form, self._parameters)))
        batches = _readable(self.data.test_batches(self.config.batch_size))
        row = {
            "kind": "epoch",
            "step": self.step,
            "epoch": epoch,
            **self._means(self._epoch),
            "test_accuracy": self.trainer.evaluate(tested, batches),
            "lr": self._lr(),
            "density": network_size.density(
                masks, shapes, self.trainer.shapes, self._history.sparse()
            ),
            "parameters": self._parameters,
            **health(self.state.params, self.state.opt_state, self.trainer.spec is not None),
            "sad": float(bsj.sad(masks, self._masks).total) if comparable else None,
            **self._history.numbers(),
            "step_ms_median": median,
            "step_ms_iqr": iqr,
        }
        self._masks, self._epoch = masks, Sums()
        self.folder.append(row)
        line = (
            f"epoch {epoch + 1}/{self.config.epochs}: loss {row['loss']:.3f}, test "
            f"{row['test_accuracy']:.2%}{remarks(row)}"
        )
        return line, row["test_accuracy"]

    def _means(self, sums: Sums) -> dict[str, float]:
        return {
            "loss": sums.loss / sums.steps,
            "train_accuracy": sums.correct / (sums.steps * self.config.batch_size),
        }

    def _lr(self) -> float:
        at = passes(self.config, self.length).position(self.step - 1)
        return float(learning_rate(self.config, self.length)(at))

    def _finish(self) -> dict[str, Any]:
        """Draws the pictures and writes the result."""
        rows = self.folder.metrics()
        result = result_of(self.trainer, self.state, self._history, self._timer, rows, self.seconds)
        assert self.config.options is not None
        result |= self.config.options.finish(to_form("masked", self.state), self.folder.path)
        title = f"{self.config.method}: {self.config.model} on {self.config.dataset}"
        if self._pictures:
            plots.learning_curves(rows, self.folder.path / "learning_curves.png", title)
            plots.block_structure(
                masks_of(self.state),
                layouts_of(self.state),
                self.folder.path / "block_structure.png",
                title,
            )
        self.folder.write_result(result)
        return result


def _readable(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; OSError where one cannot be read, which is no fault of the program."""
    try:
        yield from batches
    except ValueError as error:
        raise OSError(f"the data cannot be read: {error}") from error
