"""Trains one network: `python -m experiments.train --dataset digits --model cnn --method hrbp
--sparsity 0.9 --epochs 5 --out runs/a`.

Every method and execution runs in the same loop (loop.py). Stop it anywhere and go on with
`--resume --out runs/a`: the run continues from its last checkpoint and ends with the same bits as
without the stop. On 2 CPU cores the command above takes half a minute and reaches about 97% on
digits.
"""

import dataclasses
import functools
import math
import sys
import time
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import blocksparse_jax as bsj
from experiments.bench import measure
from experiments.bench.environment import commit, device, versions
from experiments.bench.timing import StepTimer, median_iqr
from experiments.data import load
from experiments.models.flops import conv_positions
from experiments.reporting import plots
from experiments.training.config import TrainConfig, resolve
from experiments.training.loop import Metrics, State, Trainer
from experiments.training.methods import Length, learning_rate
from experiments.training.run_folder import RunFolder

_QUIET = 10.0  # seconds after which a run without a terminal says how far it is


class Sums(NamedTuple):
    """Sums over the steps of a logging window or an epoch."""

    loss: float = 0.0
    correct: int = 0
    steps: int = 0


class Run:
    """One training run: everything that can be wrong is found when it is made, `train` then does
    the work.

    Args:
      config: what to train; fields left at None take their preset.
      resume: go on with the run in the folder.

    Attributes:
      config: the resolved config.
      folder: the run folder.
      trainer: the steps.
      state: of the training, after `step` steps.
      step: steps done.
      seconds: of training, over all sessions, up to the last checkpoint.

    Raises:
      ValueError: a field, the folder or a checkpoint is wrong; the message says which and what to
        do.
      FileNotFoundError: the data set is not prepared; the message holds the command.
    """

    def __init__(self, config: TrainConfig, resume: bool = False):
        self.config = config = resolve(config)
        self.folder = RunFolder.open(config, resume)
        self.data = load(config.dataset, config.data_dir)
        per_epoch = self.data.steps_per_epoch(config.batch_size)
        self.length = Length(per_epoch, per_epoch * config.epochs)
        self.trainer = Trainer(config, self.data.image_shape, self.data.num_classes, self.length)
        self.state: State = self.trainer.init()
        self.step, self.seconds, self._since = 0, 0.0, time.perf_counter()
        self._masks = self.trainer.masks(self.state)  # at the last epoch's end, for the SAD
        self._window, self._epoch = Sums(), Sums()
        self._pending: list[Metrics] = []
        self._timer = StepTimer()
        last = self.folder.latest() if resume else None
        if last is not None:
            self._restore(last)
        self.folder.start(config)
        self.folder.rewind(self.step)

    def _restore(self, step: int) -> None:
        meta = self.folder.meta(step)
        like = self.trainer.to(meta["form"], self.state), self._masks
        self.state, self._masks = self.folder.restore(step, like)
        self.step, self._window, self._epoch = step, Sums(*meta["window"]), Sums(*meta["epoch"])
        self.seconds = meta["seconds"]

    def _save(self) -> None:
        self._fetch()
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        meta = {
            "form": self.state.form,
            "window": self._window,
            "epoch": self._epoch,
            "seconds": self.seconds,
        }
        self.folder.save(self.step, (self.state, self._masks), meta)

    def train(self, stop_after: int | None = None) -> dict[str, Any] | None:
        """Trains to the end, or for some steps.

        Args:
          stop_after: write a checkpoint and return after this many steps of the run; None trains to
            the end.

        Returns:
          The result, as in result.json; None when it stopped before the end.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        if self.step == self.length.total and (done := self.folder.result()) is not None:
            return done
        console = Console()
        self._since = said = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
        )
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(
                self.config.method, total=self.length.total, completed=self.step, info=""
            )
            while self.step < self.length.total:
                epoch, done = divmod(self.step, self.length.steps_per_epoch)
                for images, labels in self.data.train_batches(
                    epoch, self.config.batch_size, self.config.seed, start_step=done
                ):
                    self._train_step(images, labels)
                    if self.step % self.config.log_every == 0:
                        loss = self._log_window(epoch)
                        bar.update(task, completed=self.step)
                        if not console.is_terminal and time.perf_counter() - said > _QUIET:
                            console.print(
                                f"{self.config.method} step {self.step}/{self.length.total}: loss "
                                f"{loss:.3f}"
                            )
                            said = time.perf_counter()
                    if self.step % self.length.steps_per_epoch == 0:
                        row = self._log_epoch(epoch)
                        line = f"epoch {epoch + 1}/{self.config.epochs}: loss {row['loss']:.3f}, test {row['test_accuracy']:.2%}"
                        bar.update(task, completed=self.step, info=line)
                        if not console.is_terminal:
                            console.print(f"{self.config.method} {line}")
                            said = time.perf_counter()
                    stop = self.step == stop_after
                    every = self.config.checkpoint_every
                    if (
                        stop
                        or self.step % self.length.steps_per_epoch == 0
                        or (every and self.step % every == 0)
                    ):
                        self._save()
                    if stop:
                        return None
        return self._finish()

    def _train_step(self, images: Any, labels: Any) -> None:
        step, state, trainer = self.step, self.state, self.trainer
        moves = trainer.recipe.changes(step) or trainer.form(step + 1) != state.form
        program = state.form, tuple(leaf.shape for leaf in jax.tree.leaves(state.layouts))
        kind = "topology" if moves else state.form
        self.state, metrics = self._timer.time(
            kind, program, lambda: trainer.step(state, step, images, labels)
        )
        self._pending.append(metrics)
        self.step += 1

    def _fetch(self) -> None:
        """Brings the metrics of the steps since the last call from the device, all at once."""
        for loss, correct in jax.device_get(self._pending):
            self._window, self._epoch = (
                Sums(s.loss + float(loss), s.correct + int(correct), s.steps + 1)
                for s in (self._window, self._epoch)
            )
        self._pending.clear()
        if not math.isfinite(self._epoch.loss):
            raise FloatingPointError(
                f"the loss is {self._epoch.loss} at step {self.step}; lower --lr "
                f"({self.config.lr:g})"
            )

    def _log_window(self, epoch: int) -> float:
        self._fetch()
        means = self._means(self._window)
        self.folder.append(
            {"kind": "train", "step": self.step, "epoch": epoch} | means | {"lr": self._lr()}
        )
        self._window = Sums()
        return means["loss"]

    def _log_epoch(self, epoch: int) -> dict[str, Any]:
        self._fetch()
        masks = self.trainer.masks(self.state)
        median, iqr = median_iqr(self._timer.milliseconds(self.state.form))
        row = {
            "kind": "epoch",
            "step": self.step,
            "epoch": epoch,
            **self._means(self._epoch),
            "test_accuracy": self.trainer.evaluate(
                self.state, self.data.test_batches(self.config.batch_size)
            ),
            "lr": self._lr(),
            "density": float(bsj.metrics.density(masks)),
            "sad": float(bsj.sad(masks, self._masks).total),
            "step_ms_median": median,
            "step_ms_iqr": iqr,
        }
        self._masks, self._epoch = masks, Sums()
        self.folder.append(row)
        return row

    def _means(self, sums: Sums) -> dict[str, float]:
        return {
            "loss": sums.loss / sums.steps,
            "train_accuracy": sums.correct / (sums.steps * self.config.batch_size),
        }

    def _lr(self) -> float:
        return float(learning_rate(self.config, self.length)(self.step - 1))

    def _finish(self) -> dict[str, Any]:
        masks = self.trainer.masks(self.state)
        dense = self.trainer.to("masked", self.state)
        variables = {"params": dense.params, "batch_stats": dense.batch_stats}
        positions = conv_positions(self.trainer.model("masked"), variables, self.data.image_shape)
        rows = self.folder.metrics()
        last = [row for row in rows if row["kind"] == "epoch"][-1]
        median, iqr = median_iqr(self._timer.milliseconds(self.state.form))
        config = {
            name: getattr(self.config, name)
            for name in ("method", "dataset", "model", "width", "seed", "sparsity")
        }
        result = config | {
            "density": last["density"],
            "test_accuracy": last["test_accuracy"],
            "train_loss": last["loss"],
            "kept_flops_fraction": bsj.metrics.kept_flops(masks, dense.params, positions),
            "step_ms_median": median if median is not None else last["step_ms_median"],
            "step_ms_iqr": iqr if iqr is not None else last["step_ms_iqr"],
            "topology_step_ms_median": median_iqr(self._timer.milliseconds("topology"))[0],
            "epochs": self.config.epochs,
            "steps": self.step,
            "batch_size": self.config.batch_size,
            "execution": self.config.execution,
            "precision": self.config.precision,
            "train_seconds": round(self.seconds, 1),
            "device": device(),
            "versions": versions(),
            "commit": commit(),
        }
        title = f"{self.config.method}: {self.config.model} on {self.config.dataset}"
        plots.learning_curves(rows, self.folder.path / "learning_curves.png", title)
        plots.block_structure(
            masks, self.trainer.layouts(self.state), self.folder.path / "block_structure.png", title
        )
        self.folder.write_result(result)
        return result


def main(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """Trains to the end.

    Args:
      config: what to train.
      resume: go on with the run in `config.out`.

    Returns:
      The result, as in result.json.

    Raises:
      ValueError: a field, the folder or a checkpoint is wrong.
      FileNotFoundError: the data set is not prepared.
      FloatingPointError: training diverged.

    Example:
      main(TrainConfig(dataset="digits", method="hrbp", epochs=5, out="runs/a"))["test_accuracy"]
    """
    measure.steady_memory()
    result = Run(config, resume).train()
    assert result is not None
    return result


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains one network with one method.

    Attributes:
      config: what to train.
      resume: go on with the run in --out, from its last checkpoint and with its config; flags that
        are given must agree with it.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    resume: bool = False


def cli(args: list[str] | None = None) -> None:
    """The command line: wrong arguments, a wrong folder or missing data end it with one line and
    exit code 2, diverging with 1.

    Args:
      args: None takes the process's arguments.
    """
    try:
        config, resume = _parse(args)
        print(
            f"{config.method} on {config.dataset}: {config.model}, {config.epochs} epochs of "
            f"batches of {config.batch_size}, "
            f"{config.execution}, {config.precision}; {device()}; run folder {config.out}",
            flush=True,
        )
        run = Run(config, resume)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        result = run.train()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    assert result is not None
    name = f"{run.folder.path.name}, {config.method}"
    Console().print(
        f"{name}: test accuracy {result['test_accuracy']:.2%}, density {result['density']:.4f}"
    )
    if run.trainer.recipe.transform is not None:
        dense = run.trainer.to("masked", run.state)
        print(
            dataclasses.replace(bsj.summarize(dense.params, dense.opt_state), method=config.method)
        )


def _parse(args: list[str] | None) -> tuple[TrainConfig, bool]:
    """The resolved config and whether to resume; then the run's own config stands for the flags
    that are not given.
    """
    parse = functools.partial(tyro.cli, Arguments, args=args, prog="python -m experiments.train")
    given = parse()
    if given.resume:
        folder = RunFolder(given.config.out or str(resolve(given.config).out))
        if (folder.path / "config.json").exists():
            given = parse(
                default=Arguments(
                    dataclasses.replace(folder.config(), out=str(folder.path)), resume=True
                )
            )
    return resolve(given.config), given.resume


if __name__ == "__main__":
    cli()
