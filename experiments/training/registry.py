"""The registry of training methods: a name, the library's function and the method's options.

A new method is one line of `METHODS`; its table rows are read off what it publishes.
"""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import blocksparse_jax as bsj
from blocksparse_jax import _checks
from experiments.training import methods
from experiments.training.length import Length
from experiments.training.methods import Options, Setup

_SAMPLE = Length(steps_per_epoch=100, total=1000)
_COLUMNS = ("function", "pattern", "masks change", "needs", "execution", "reference", "ours")
CAPTION = f"Steps are those of a run of {_SAMPLE.total}, {_SAMPLE.steps_per_epoch} in an epoch."


@dataclasses.dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
      options: its options with their defaults.
      function: makes its transformation from `options.arguments`; None trains dense.
      source: the function whose docstring names the paper; None is `function`. Without a
        `function`, what the options' operations call between two steps.
      argument: the argument of `function` that the source makes.
      needs_batch: it looks at a batch of the training set before training.
    """

    options: Options
    function: Callable[..., optax.GradientTransformation] | None = None
    source: Callable[..., Any] | None = None
    argument: str = ""
    needs_batch: bool = False

    def build(self, options: Options, setup: Setup) -> optax.GradientTransformation | None:
        """The transformation, first in the chain; None trains dense."""
        return None if self.function is None else self.function(**options.arguments(setup))


METHODS: dict[str, Method] = {
    "dense": Method(methods.Options()),
    "hrbp": Method(methods.Hrbp(), bsj.hrbp_prune),
    "hrbp-dynamic": Method(methods.HrbpDynamic(), bsj.hrbp_prune),
    "subp": Method(methods.Subp(), bsj.subp),
    "sr-ste": Method(methods.SrSte(), bsj.sr_ste),
    "ste": Method(methods.NOfM(), bsj.ste),
    "rigl": Method(methods.Dynamic(), bsj.rigl),
    "set": Method(methods.Set(), bsj.set_),
    "snfs": Method(methods.Dynamic(), bsj.snfs),
    "deep-r": Method(methods.DeepR(), bsj.deep_r),
    "dsr": Method(methods.Dsr(), bsj.dsr),
    "granet": Method(methods.GraNet(), bsj.granet),
    "srigl": Method(methods.SRigL(), bsj.srigl),
    "mest": Method(methods.Mest(), bsj.mest),
    "nest": Method(methods.Nest(), bsj.nest, needs_batch=True),
    "narang": Method(methods.Narang(), bsj.narang),
    "drop-and-grow": Method(methods.DropAndGrow(budget="erk"), bsj.drop_and_grow),
    "campfire": Method(methods.Campfire(), bsj.campfire),
    "magnitude": Method(methods.Magnitude(), bsj.magnitude),
    "snip": Method(methods.Snip(), bsj.one_shot, bsj.snip, "scores", needs_batch=True),
    "grasp": Method(methods.Grasp(), bsj.one_shot, bsj.grasp, "scores", needs_batch=True),
    "synflow": Method(methods.Synflow(), bsj.one_shot, bsj.synflow, "scores"),
    "lottery": Method(methods.Lottery(), bsj.external_masks, bsj.lottery_ticket),
    "gradual": Method(methods.Gradual(), bsj.gradual),
    "variational-dropout": Method(methods.VariationalDropout(), bsj.variational_dropout),
    "deep-compression": Method(methods.DeepCompression(), bsj.deep_compression),
    "random": Method(methods.RandomWeights(), bsj.fixed_masks, bsj.random_masks, "masks"),
    "random-channel": Method(
        methods.RandomChannels(), bsj.fixed_masks, bsj.random_channel_layouts, "layouts"
    ),
    "prune-train": Method(methods.PruneTrain(), bsj.prune_train),
    "slimming": Method(methods.Slimming(), bsj.slimming),
    "sss": Method(methods.Sss(), bsj.sss),
    "group-lasso": Method(methods.GroupLasso(), bsj.group_lasso),
    "brain-damage": Method(methods.BrainDamage(), bsj.brain_damage),
    "l1-filters": Method(methods.L1Filters(), source=bsj.l1_filters),
    "thinet": Method(methods.ThiNet(), source=bsj.thinet, needs_batch=True),
    "lasso-channels": Method(methods.LassoChannels(), source=bsj.lasso_channels, needs_batch=True),
    "pfa": Method(methods.Pfa(), source=bsj.pfa, needs_batch=True),
    "rumi": Method(methods.Rumi(), bsj.fixed_masks, bsj.rumi_masks, "masks"),
    "dsb": Method(methods.Dsb(), bsj.fixed_masks, bsj.dsb_masks, "masks"),
}


def method(name: str) -> Method:
    """The entry of a name; ValueError, with the nearest name, where there is none."""
    return METHODS[_checks.choice("method", name, METHODS)]


def rows() -> list[dict[str, str]]:
    """What is known of every method, read off its docstring and off the spec that it publishes.

    Returns:
      A row for each method: its name, the library's function, the pattern, when masks change in the
      run that `CAPTION` describes, what it needs beside the masked gradient, the execution, the
      paper, and what the paper leaves open.
    """
    return [{"method": name} | _row(entry) for name, entry in METHODS.items()]


def _row(entry: Method) -> dict[str, str]:
    pattern = entry.options.make_pattern()
    source = entry.source or entry.function
    if source is None:
        return dict(zip(_COLUMNS, ("—", "—", "—", "—", "dense", "—", "—"), strict=True))
    if pattern is None:
        return _row_of_smaller_networks(entry, source)
    setup = Setup(
        0.9,
        jax.random.key(0),
        _SAMPLE,
        {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 64, 64))},
        _sample_loss,
        batch=(jnp.ones((2, 2, 2, 64)), jnp.zeros(2, jnp.int32)),
        model=_SampleModel(),
        image_shape=(2, 2, 64),
    )
    transform = entry.build(entry.options, setup)
    assert transform is not None
    spec = bsj.get_spec(transform.init(setup.params))
    changes = [step for step in range(_SAMPLE.total) if spec.changes(step)]
    dense = [step for step in range(_SAMPLE.total) if spec.dense_gradient(step)]
    needs = ["a batch before training"] if entry.needs_batch else []
    if dense:
        steps = "at these steps" if dense == changes else _steps(dense)
        needs.append(f"dense gradient {steps}")
    return dict(
        zip(
            _COLUMNS,
            (
                _code(entry),
                pattern.noun,
                _steps(changes),
                ", ".join(needs) or "—",
                "packed (has a layout)" if pattern.has_layout else "masked (no layout)",
                _reference(source),
                _ours(entry, source),
            ),
            strict=True,
        )
    )


def _row_of_smaller_networks(entry: Method, source: Callable[..., Any]) -> dict[str, str]:
    """The row of a method that masks nothing and removes channels between two steps."""
    setup = Setup(0.9, jax.random.key(0), _SAMPLE, {})
    steps = _steps(sorted(entry.options.operations(setup)))
    needs = "a batch" if entry.needs_batch else "—"
    cells = source.__name__, "channels, removed", steps, needs, "dense, a smaller network"
    return dict(zip(_COLUMNS, (*cells, _reference(source), _ours(entry, source)), strict=True))


def _code(entry: Method) -> str:
    """The library's function, around the source of its masks, layouts or scores if it takes one."""
    assert entry.function is not None
    name = entry.function.__name__
    if entry.source is None:
        return name
    if not entry.argument:  # the training loop calls it
        return f"{name}(...), {entry.source.__name__}(...)"
    return f"{name}({entry.argument}={entry.source.__name__}(...))"


class _SampleModel(nn.Module):
    """One convolution and the mean over the image."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.ones, (3, 3, 64, 64))
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return y.mean((1, 2))


def _sample_loss(params: Any, batch: Any) -> jax.Array:
    return batch[0].mean() * jnp.square(params["kernel"]).sum()


def _steps(steps: list[int]) -> str:
    """Steps of the sample run in words."""
    if not steps:
        return "never"
    if len(steps) == _SAMPLE.total:
        return "every step"
    if len(steps) == 1:
        return f"step {steps[0]}"
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    if len(gaps) > 1 and gaps[-1] < gaps[-2]:
        gaps.pop()  # the end of a schedule, which may come sooner
    least, most = min(gaps), max(gaps)
    often = f"every {least} to {most} steps" if least < most else f"every {least} steps"
    return f"{often if most > 1 else 'every step'}, {steps[0]} to {steps[-1]}"


def _reference(source: Callable[..., Any]) -> str:
    """Authors, venue and year of the first paper that a docstring names, without its title."""
    text = " ".join((inspect.getdoc(source) or "").partition("Reference:")[2].split())
    paper = re.match(r".*?\b(19|20)\d\d\b", text)
    return re.sub(r'"[^"]*",? ', "", paper.group()) if paper else text


def _ours(entry: Method, source: Callable[..., Any]) -> str:
    """What is our choice where the paper is silent, as the library and the options say."""
    reference = (inspect.getdoc(source) or "").partition("Reference:")[2]
    options = (inspect.getdoc(type(entry.options)) or "").partition("Attributes:")[0]
    return "; ".join(_our_choices(reference) + _our_choices(options)) or "—"


def _our_choices(text: str) -> list[str]:
    """Of "Our choice: A; B." all of it, of "C; D is our choice." what calls itself so."""
    choices = []
    for sentence in re.split(r"(?<=\.) ", " ".join(text.split())):
        opens = re.match(r"our choice[:,]? ", sentence, re.IGNORECASE)
        for clause in [sentence[opens.end() :]] if opens else sentence.split("; "):
            closes = re.search(r",? (is|are) our choice\W*$", clause)
            if opens or closes:
                choices.append(clause[: closes.start()] if closes else clause.rstrip("."))
    return choices
