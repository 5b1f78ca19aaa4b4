"""Times training steps of a plain Flax network that becomes sparse unchanged.

`python -m experiments.bench.unchanged` takes about two minutes on 2 CPU cores. A residual network
of `nn.Conv` in NHWC is trained dense, on masked weights, with `use_layouts`, and with `use_layouts`
inside `cancel_transposes`; beside them the same network of `BlockSparseConv` in CHWN, the layout of
the kernels. All of them start from the same weights, and their losses must agree before anything is
timed.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import blocksparse_jax as bsj
from experiments.bench import command
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import median_iqr, time_in_turn, timed
from experiments.reporting import markdown, results
from experiments.reporting.reports import unchanged as report_tables

STAGES = ((1, 1), (1, 1), (2, 2), (1, 2), (2, 4), (1, 4))  # strides and factor of each block


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      sparsity: of static HRBP.
      width: channels of the first stage.
      blocks: of two convolutions each, at most 6.
      image_size: pixels; images have 3 channels.
      batch_size: images in a step.
      repetitions: timed steps of each execution, in turn.
      out: JSON file; None is experiments/results/bench_unchanged_cpu.json.
      quick: a narrow network, a small batch; writes a file only if `out` is given.
    """

    sparsity: float = 0.9
    width: int = 64
    blocks: int = len(STAGES)
    image_size: int = 32
    batch_size: int = 64
    repetitions: int = 9
    out: str | None = None
    quick: bool = False


class Net(nn.Module):
    """A residual network, as a user of Flax writes it; CHWN for the comparison.

    Attributes:
      width: channels of the first stage.
      blocks: of two convolutions each.
      chwn: the same network of `BlockSparseConv` in CHWN.
    """

    width: int
    blocks: int
    chwn: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of NHWC images."""
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, axis=0 if self.chwn else -1
        )
        if self.chwn:
            x = x.transpose(3, 1, 2, 0)
        x = nn.relu(norm()(self._conv(1, 1, "stem")(x)))
        for number, (strides, factor) in enumerate(STAGES[: self.blocks]):
            shortcut = x
            x = nn.relu(norm()(self._conv(factor, strides, f"conv{2 * number}")(x)))
            x = norm()(self._conv(factor, 1, f"conv{2 * number + 1}")(x))
            x = nn.relu(x + shortcut if x.shape == shortcut.shape else x)
        x = x.mean((1, 2))
        return nn.Dense(10, name="classifier")(x.T if self.chwn else x)

    def _conv(self, factor: int, strides: int, name: str) -> nn.Module:
        features, size, both = self.width * factor, (3, 3), (strides, strides)
        if self.chwn:
            return bsj.linen.BlockSparseConv(
                features, size, both, use_bias=False, data_format="CHWN", name=name
            )
        return nn.Conv(features, size, both, use_bias=False, name=name)


def main(config: Config) -> dict[str, Any]:
    """Times the steps, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: a row for each execution, device, versions and commit.

    Raises:
      AssertionError: two executions of one step disagree.
    """
    if config.quick:
        config = dataclasses.replace(
            config, width=32, blocks=1, image_size=8, batch_size=8, repetitions=2
        )
    steady_memory()
    report = origin() | {"config": results.settings(config)}
    programs, losses = {}, {}
    for name, (step, arguments) in _steps(config).items():
        programs[name] = jax.jit(step).lower(*arguments).compile()
        losses[name] = float(programs[name](*arguments)[0])
        programs[name] = functools.partial(programs[name], *arguments)
    np.testing.assert_allclose(
        list(losses.values()), losses["masked, NHWC"], rtol=1e-4, err_msg=str(losses)
    )
    calls = {name: timed(program) for name, program in programs.items()}
    times_ms = time_in_turn(calls, rounds=config.repetitions)
    dense_ms = median_iqr(times_ms["dense, NHWC"])[0] or 1.0
    report["rows"] = []
    for name, times in times_ms.items():
        median, iqr = median_iqr(times)
        row = {
            "execution": name,
            "transposes": _transposes(programs[name].func),
            "step_ms_median": median,
            "step_ms_iqr": iqr,
            "speed_up_over_dense": round(dense_ms / (median or 1.0), 3),
        }
        report["rows"].append(row)
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_unchanged_cpu.json")
    return report


def _steps(config: Config) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Steps of training (loss and gradients, then SGD with momentum), and their arguments."""
    size = config.image_size
    images = jax.random.normal(jax.random.key(0), (config.batch_size, size, size, 3))
    labels = jnp.arange(config.batch_size) % 10
    plain, chwn = (Net(config.width, config.blocks, chwn) for chwn in (False, True))
    variables = jax.jit(plain.init)(jax.random.key(1), images)
    tx = bsj.sparse(bsj.hrbp_prune(config.sparsity), optax.sgd(0.1, momentum=0.9))
    state = tx.init(variables["params"])
    params = bsj.apply_masks(variables["params"], bsj.get_masks(state))
    layouts = bsj.get_layouts(state)

    def step(
        tx: optax.GradientTransformation,
        run: Callable[[Any, Any], jax.Array],
        params: Any,
        state: Any,
        layouts: Any,
    ) -> tuple[jax.Array, Any, Any]:
        def loss_fn(params: Any) -> jax.Array:
            logits = run(params, layouts)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    def apply(model: nn.Module, params: Any, **collections: Any) -> jax.Array:
        rest = {"batch_stats": variables["batch_stats"]} | collections
        logits, _ = model.apply({"params": params} | rest, images, mutable=["batch_stats"])
        return logits

    def dense(params: Any, layouts: Any) -> jax.Array:
        return apply(plain, params)

    def sparse(params: Any, layouts: Any) -> jax.Array:
        with bsj.linen.use_layouts(layouts):
            return apply(plain, params)

    def native(params: Any, layouts: Any) -> jax.Array:
        return apply(chwn, params, layouts=layouts)

    steps = {
        "masked, NHWC": functools.partial(step, tx, dense),
        "use_layouts, NHWC": functools.partial(step, tx, sparse),
        "use_layouts and cancel_transposes, NHWC": bsj.cancel_transposes(
            functools.partial(step, tx, sparse)
        ),
        "BlockSparseConv, CHWN": functools.partial(step, tx, native),
    }
    optimizer = optax.sgd(0.1, momentum=0.9)
    start = params, optimizer.init(params), layouts
    return {"dense, NHWC": (functools.partial(step, optimizer, dense), start)} | {
        name: (run, (params, state, layouts)) for name, run in steps.items()
    }


def _transposes(program: Any) -> int:
    """Transposes and copies of 4-D arrays in the compiled step."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|copy)\(", program.as_text())
    return sum(shape.count(",") == 3 for shape in shapes)


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.unchanged", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
