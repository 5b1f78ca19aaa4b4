"""What a run is: the frozen `TrainConfig`, one preset per data set, and the checks that name a
typo's nearest option.
"""

import dataclasses
from typing import Any, get_args

import blocksparse_jax as bsj
from blocksparse_jax import _checks, scores
from experiments.data.specs import SPECS
from experiments.models import names as model_names
from experiments.training.methods import BUDGETS, METHODS

EXECUTIONS = ("masked", "sparse", "packed")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "adam")
LR_SCHEDULES = ("step", "cosine", "constant")

_CIFAR = {
    "epochs": 160,
    "batch_size": 128,
    "lr": 0.1,
    "lr_schedule": "step",
    "weight_decay": 5e-4,
    "label_smoothing": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 20,
        "batch_size": 64,
        "lr": 0.1,
        "lr_schedule": "cosine",
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
    },
    "mnist": {
        "epochs": 5,
        "batch_size": 128,
        "lr": 0.1,
        "lr_schedule": "cosine",
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
    },
    "cifar10": _CIFAR,  # Ma et al., CPAL 2024; lr / 10 at epochs 80 and 120
    "cifar100": _CIFAR,
    "tiny_imagenet": _CIFAR | {"epochs": 100},
    "imagenet2012": {
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
        "lr_schedule": "cosine",
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
        "stem": "imagenet",
    },
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; a field left at None takes the data set's preset.

    Attributes:
      dataset: digits, mnist, cifar10, cifar100, tiny_imagenet, imagenet2012.
      model: cnn, resnet20, resnet32, resnet56, vgg19, resnet18, resnet34, resnet50, resnet50_v1_5,
        mobilenet_v1.
      method: dense, hrbp, hrbp-dynamic, subp, sr-ste, ste, rigl, random, random-channel, gradual.
      sparsity: fraction of the sparse layers' weights that is removed; None is what the method
        fixes (dense 0, sr-ste and ste 1 - n/m), else 0.9.
      epochs: passes over the training set.
      seed: of the initial weights, the masks and the data order.
      out: run folder; None is runs/DATASET-MODEL-METHOD-SEED.
      execution: masked (dense conv on masked weights), sparse (block-sparse conv, dense
        parameters), packed (block-sparse conv, packed parameters and optimizer state); None is
        packed where the method's pattern has a layout, else masked.
      precision: float32 or bfloat16 (of the activations; parameters stay float32).
      width: multiplies the channels; 2 gives the GraSP ResNets.
      stem: cifar (images up to 64x64) or imagenet (strided).
      implementation: of the block-sparse conv: xla, cpu, triton, mosaic_gpu or dense; None picks.
      data_dir: where prepare_data wrote the data sets.
      batch_size: images per step.
      optimizer: sgd or adam.
      lr: peak learning rate.
      lr_schedule: step (a tenth after 1/2 and again after 3/4 of training), cosine or constant.
      momentum: of sgd.
      weight_decay: not applied to 1-D parameters.
      label_smoothing: mass spread over all classes.
      group_size: filters in a group (hrbp).
      block_density: fraction of the taps that a group keeps (hrbp); 1 keeps whole kernels.
      channel_block: input channels come in aligned runs of this many (hrbp).
      channel_order: reorder the channels once, before training, so that these runs lose little
        (hrbp with magnitude scores).
      budget: how the layers share the density: uniform, erk or er (hrbp, hrbp-dynamic, rigl,
        random, gradual); None is the method's own, erk for rigl and uniform for the others.
      scores: magnitude, gradient or random, of hrbp's first masks.
      update_every: steps between mask updates; None is an epoch for subp, and for the others 100 or
        an epoch if that is shorter.
      drop_fraction: of the kept weights, at the first update (rigl, hrbp-dynamic).
      n: kept weights of every m (sr-ste, ste).
      m: consecutive weights along the input axis (sr-ste, ste).
      block: filters in a 1xN block (subp).
      criterion: l1, l2 or bpar (subp).
      log_every: steps between two rows of metrics.jsonl.
      checkpoint_every: steps between two checkpoints, besides the one at each epoch's end; None is
        only there.
    """

    dataset: str = "digits"
    model: str = "cnn"
    method: str = "hrbp"
    sparsity: float | None = None
    epochs: int | None = None
    seed: int = 0
    out: str | None = None
    execution: str | None = None
    precision: str = "float32"
    width: float = 1
    stem: str | None = None
    implementation: str | None = None
    data_dir: str = "data"
    batch_size: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    lr_schedule: str | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float | None = None
    group_size: int = 32
    block_density: float = 1 / 3
    channel_block: int = 1
    channel_order: bool = False
    budget: str | None = None
    scores: str = "magnitude"
    update_every: int | None = None
    drop_fraction: float = 0.3
    n: int = 2
    m: int = 4
    block: int = 16
    criterion: str = "l1"
    log_every: int = 50
    checkpoint_every: int | None = None


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills the fields left at None and checks all of them.

    Args:
      config: as a user wrote it.

    Returns:
      The complete config; `update_every` and `checkpoint_every` may stay None.

    Raises:
      ValueError: names the field, the value, what was expected and, for a typo, the nearest option.

    Example:
      >>> resolve(TrainConfig(dataset="cifar10")).epochs
      160
      >>> resolve(TrainConfig(method="hrpb"))
      Traceback (most recent call last):
      ...
      ValueError: method: expected one of 'dense', 'hrbp', ..., got 'hrpb'; did you mean 'hrbp'?
    """
    for name, options in (
        ("dataset", SPECS),
        ("model", model_names()),
        ("method", METHODS),
        ("precision", PRECISIONS),
    ):
        _checks.choice(name, getattr(config, name), options)
    preset = {"stem": "cifar"} | PRESETS[config.dataset]
    preset = {k: v for k, v in preset.items() if getattr(config, k) is None}
    method = METHODS[config.method]
    config = dataclasses.replace(
        config,
        **preset,
        out=config.out or f"runs/{config.dataset}-{config.model}-{config.method}-{config.seed}",
        execution=config.execution or ("packed" if method.has_layout else "masked"),
        sparsity=_sparsity(config),
        budget=_budget(config),
    )
    choices = {"execution": EXECUTIONS, "optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES}
    choices |= {"scores": get_args(scores.Kind), "criterion": get_args(scores.Criterion)}
    for name, options in choices.items():
        _checks.choice(name, getattr(config, name), options)
    if config.execution != "masked" and not method.has_layout:
        names = ", ".join(name for name, m in METHODS.items() if m.has_layout)
        raise ValueError(
            f"execution: the masks of {config.method!r} have no block layout, so "
            f"{config.execution!r} cannot run them; "
            f"use --execution masked, or a method that has one: {names}"
        )
    if config.implementation is not None:
        available = bsj.available_implementations()
        if reason := available[_checks.choice("implementation", config.implementation, available)]:
            raise ValueError(f"implementation: {config.implementation!r} cannot run here: {reason}")
    if config.channel_order and not (
        config.method.startswith("hrbp")
        and config.channel_block > 1
        and config.scores == "magnitude"
    ):
        got = f"--method {config.method} --channel-block {config.channel_block} --scores {config.scores}"
        raise ValueError(
            f"channel_order: it serves hrbp's runs by magnitude, expected --channel-block 8 or the "
            f"like, got {got}"
        )
    for name in ("label_smoothing", "momentum"):
        _checks.fraction(name, getattr(config, name))
    for name in ("block_density", "drop_fraction"):
        _checks.fraction(name, getattr(config, name), high_open=False)
    for name in ("lr", "width", "block_density"):
        _positive(name, getattr(config, name))
    _positive("weight_decay", config.weight_decay, or_zero=True)
    for name in (
        "epochs",
        "batch_size",
        "group_size",
        "channel_block",
        "n",
        "m",
        "block",
        "log_every",
    ):
        _checks.positive_int(name, getattr(config, name))
    for name in ("update_every", "checkpoint_every"):
        if getattr(config, name) is not None:
            _checks.positive_int(name, getattr(config, name))
    return config


def _sparsity(config: TrainConfig) -> float:
    """What the method fixes, else what was asked for, else 0.9."""
    fixed = METHODS[config.method].sparsity
    if fixed is None:
        return _checks.fraction("sparsity", 0.9 if config.sparsity is None else config.sparsity)
    if config.sparsity not in (None, fixed(config)):
        flags = (
            "; leave --sparsity out"
            if config.method == "dense"
            else f" (--n {config.n} --m {config.m}); set these two instead"
        )
        raise ValueError(
            f"sparsity: {config.method} has {fixed(config):g}{flags}, got {config.sparsity!r}"
        )
    return fixed(config)


def _budget(config: TrainConfig) -> str:
    """What was asked for, else the method's own; ValueError where the method takes no other."""
    known = METHODS[config.method].budgets
    if config.budget is None:
        return known[0]
    if _checks.choice("budget", config.budget, BUDGETS) not in known:
        raise ValueError(
            f"budget: {config.method} prunes all layers alike ({known[0]!r}); leave --budget out, "
            f"got {config.budget!r}"
        )
    return config.budget


def _positive(name: str, value: Any, or_zero: bool = False) -> None:
    """ValueError unless the value is a finite number above 0 (or 0)."""
    if not (0 < value < float("inf") or (or_zero and value == 0)):
        raise ValueError(
            f"{name}: expected a number {'of at least' if or_zero else 'above'} 0, got {value!r}"
        )
