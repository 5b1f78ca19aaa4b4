"""What a run is: the frozen `TrainConfig` and the checks that name a typo's nearest option."""

import dataclasses
import re
import zlib
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import blocksparse_jax as bsj
from blocksparse_jax import _checks
from experiments.data.specs import SPECS
from experiments.models import names as model_names
from experiments.training.methods import Options
from experiments.training.presets import preset_of
from experiments.training.registry import METHODS, method
from pallas_kernels.block_sparse_conv import why_dense

EXECUTIONS = ("masked", "sparse", "packed")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "adam")
LR_STEPS = {  # part of the run -> factor of the learning rate from there on
    "step": {1 / 2: 0.1, 3 / 4: 0.1},
    "last-quarter": {3 / 4: 0.1},
    "fifths": {30_000 / 97_656: 0.2, 60_000 / 97_656: 0.2, 90_000 / 97_656: 0.2},
}
LR_SCHEDULES = (*LR_STEPS, "cosine", "constant")
_LONGEST_NAME = 180  # characters of a default run folder's name; file systems end at 255


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; a field left at None takes the data set's preset.

    Attributes:
      dataset: digits, mnist, cifar10, cifar100, tiny_imagenet, imagenet2012.
      model: cnn, resnet20, resnet32, resnet56, vgg19, resnet18, resnet34, resnet50, resnet50_v1_5,
        mobilenet_v1.
      method: `--method list` prints all of them, `--method NAME --help` shows one's own options.
      sparsity: fraction of the sparse layers' weights that is removed; None is what the method's
        pattern fixes (dense 0, sr-ste and ste 1 - n/m), else the method's default: 0.9, or 0 for
        variational-dropout, which then prunes by its threshold. Methods that remove what falls to
        zero (prune-train, sss) take none.
      epochs: passes over the training set. With --resume, more than a run that has ended had extend
        it: the learning rate then follows the schedule of the longer run, the masks keep theirs.
      seed: of the initial weights, the masks and the data order.
      out: run folder; None is runs/DATASET-MODEL-METHOD-SPARSITY-SEED, with all fields that are not
        the preset's in its name.
      execution: masked (dense conv on masked weights), sparse (block-sparse conv, dense
        parameters), packed (block-sparse conv, packed parameters and optimizer state); None is
        packed where the method's pattern has a layout, else masked, as on TPUs.
      precision: float32 or bfloat16 (of the activations; parameters stay float32).
      width: multiplies the channels; 2 gives the GraSP ResNets.
      stem: cifar (images up to 64x64) or imagenet (strided).
      implementation: of the block-sparse conv: xla, cpu, triton, mosaic_gpu or dense; None picks.
      data_dir: where prepare_data wrote the data sets.
      data_workers: processes that read and decode images of a data set that streams (imagenet2012),
        besides this one's threads.
      examples: training images, drawn from the data set in the same way each time; None is all.
      batch_size: images per step.
      optimizer: sgd or adam.
      lr: peak learning rate.
      lr_schedule: step (a tenth after 1/2 and again after 3/4 of training), last-quarter (a tenth
        after 3/4), fifths (a fifth at each of RigL's steps 30,000, 60,000 and 90,000 of 97,656),
        cosine or constant.
      warmup_epochs: in which the learning rate rises to its peak; the schedule has the rest.
      momentum: of sgd.
      nesterov: of sgd's momentum.
      weight_decay: not applied to 1-D parameters.
      label_smoothing: mass spread over all classes.
      log_every: steps between two rows of metrics.jsonl.
      checkpoint_every: steps between two checkpoints, besides the one at each epoch's end; None is
        only there.
      keep_checkpoint: the step of a checkpoint that stays for good, so that another run can start
        from its weights with --rewind; of the others the last two are kept.
      steps_per_dispatch: training steps of one program, which makes their batches too, where no
        mask changes, no row of metrics and no checkpoint falls between them and the data are on the
        device; other steps are dispatched one by one. None is 10 on GPUs, where a step can be
        shorter than its dispatch, else 1. A resumed run may have another number.
      masks: folder of a finished run, under whose masks this one trains with new random weights;
        its config stands for the flags that are not given, and the masks stay as they are.
      rewind: with --masks, start from the weights that that run had at this step: 0 is its initial
        ones, another step needs a checkpoint (--keep-checkpoint).
      options: the method's own, e.g. `methods.Subp(block=32)`; None is its defaults. On the command
        line `--METHOD.OPTION`: `--method subp --subp.block 32`.
      mask_epochs: epochs of the masks' schedule, where an extension gave the run more; None is
        `epochs`.
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
    data_workers: int = 0
    examples: int | None = None
    batch_size: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    lr_schedule: str | None = None
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    label_smoothing: float | None = None
    log_every: int = 50
    checkpoint_every: int | None = None
    keep_checkpoint: int | None = None
    steps_per_dispatch: int | None = None
    masks: str | None = None
    rewind: int | None = None
    options: Annotated[Options | None, tyro.conf.Suppress] = None
    mask_epochs: Annotated[int | None, tyro.conf.Suppress] = None


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills the fields left at None and checks all of them.

    Args:
      config: as a user wrote it.

    Returns:
      The complete config; only `examples`, `checkpoint_every`, `keep_checkpoint`, `masks`, `rewind`
      and `mask_epochs` may stay None.

    Raises:
      ValueError: names the field, the value, what was expected and, for a typo, the nearest option.

    Example:
      >>> resolve(TrainConfig(dataset="cifar10")).epochs
      160
      >>> resolve(TrainConfig(method="hrpb"))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: method: expected one of 'dense', 'hrbp', ..., got 'hrpb'; did you mean 'hrbp'?
    """
    _checks.choice("dataset", config.dataset, SPECS)
    _checks.choice("model", config.model, model_names())
    options = _options(config)
    options.check()
    pattern = options.make_pattern()
    has_layout = pattern is not None and pattern.has_layout
    preset = preset_of(config.dataset, config.model)
    config = dataclasses.replace(
        config,
        **{name: value for name, value in preset.items() if getattr(config, name) is None},
        steps_per_dispatch=_steps_per_dispatch(config),
        execution=config.execution or ("packed" if has_layout and not why_dense() else "masked"),
        sparsity=_sparsity(config, options),
        options=options,
    )
    _checks.choice("execution", config.execution, EXECUTIONS)
    _checks.choice("precision", config.precision, PRECISIONS)
    _checks.choice("optimizer", config.optimizer, OPTIMIZERS)
    _checks.choice("lr_schedule", config.lr_schedule, LR_SCHEDULES)
    if config.execution != "masked" and not has_layout:
        raise ValueError(
            f"execution: {config.execution!r} needs masks with a block layout, and "
            f"{pattern.noun if pattern else 'dense weights'} ({config.method}) have none; use "
            f"--execution masked, or a method that has one: {', '.join(_with_layout())}"
        )
    if config.implementation is not None:
        available = bsj.available_implementations()
        _checks.implementation(config.implementation, available)
        if reason := available[config.implementation]:
            raise ValueError(f"implementation: {config.implementation!r} cannot run here: {reason}")
    for name in ("label_smoothing", "momentum"):
        _checks.fraction(name, getattr(config, name))
    for name in ("lr", "width"):
        _checks.number(name, getattr(config, name), low_open=True)
    for name in ("weight_decay", "warmup_epochs"):
        _checks.number(name, getattr(config, name))
    for name in ("epochs", "batch_size", "log_every", "steps_per_dispatch"):
        _checks.positive_int(name, getattr(config, name))
    _checks.step("data_workers", config.data_workers)
    for name in ("examples", "checkpoint_every", "keep_checkpoint", "mask_epochs"):
        if getattr(config, name) is not None:
            _checks.positive_int(name, getattr(config, name))
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup_epochs: expected fewer than the run's {config.epochs} epochs, got "
            f"{config.warmup_epochs:g}"
        )
    if config.rewind is not None:
        _checks.step("rewind", config.rewind)
        if config.masks is None:
            raise ValueError(
                f"rewind: {config.rewind} is a step of the run whose masks are used; add --masks "
                "with its folder"
            )
    if config.masks is not None:
        config = dataclasses.replace(config, masks=str(Path(config.masks).absolute()))
    return config if config.out else dataclasses.replace(config, out=_default_folder(config))


def _steps_per_dispatch(config: TrainConfig) -> int:
    if config.steps_per_dispatch is not None:
        return config.steps_per_dispatch
    return 10 if jax.default_backend() == "gpu" else 1


def _default_folder(config: TrainConfig) -> str:
    """The folder of a run without --out: its name tells the runs of a sweep apart."""
    names = ("dataset", "model", "method")
    preset = resolve(TrainConfig(**{name: getattr(config, name) for name in names}, out="-"))
    values, usual = flat(config), flat(preset)
    if config.masks is not None:
        values["masks"] = Path(config.masks).name
    parts = [str(values.pop(name)) for name in (*names, "sparsity")] + [f"seed{values.pop('seed')}"]
    for name, value in values.items():
        if name not in ("out", "data_dir") and value != usual[name]:
            parts.append(f"{name.rpartition('.')[2]}{value}")
    text = re.sub(r"[^\w.+-]", "_", "-".join(parts), flags=re.ASCII)
    if len(text) > _LONGEST_NAME:
        text = f"{text[:_LONGEST_NAME]}-{zlib.crc32(text.encode()):08x}"
    return f"runs/{text}"


def flat(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config by the names of their flags.

    Args:
      config: a resolved config.

    Returns:
      Values by name; the method's options are `METHOD.OPTION`.
    """
    fields = dataclasses.asdict(config)
    options = fields.pop("options") or {}
    return fields | {f"{config.method}.{name}": value for name, value in options.items()}


def _options(config: TrainConfig) -> Options:
    """The method's options; ValueError where they are another method's."""
    default = method(config.method).options
    if config.options is None:
        return default
    if type(config.options) is not type(default):
        raise ValueError(
            f"options: expected {type(default).__name__}(...) for the method {config.method!r}, "
            f"got {config.options!r}"
        )
    return config.options


def _sparsity(config: TrainConfig, options: Options) -> float:
    """What the pattern fixes, else what was asked for, else the method's default."""
    fixed = options.fixed_sparsity()
    if fixed is None:
        asked = options.default_sparsity if config.sparsity is None else config.sparsity
        return _checks.fraction("sparsity", asked)
    if config.sparsity not in (None, fixed):
        why = f" ({reason})" if (reason := options.fixed_because()) else ""
        raise ValueError(
            f"sparsity: {config.method} has {fixed:g}{why}; leave --sparsity out, got "
            f"{config.sparsity!r}"
        )
    return fixed


def _with_layout() -> list[str]:
    """The methods whose masks have a block layout by default."""
    patterns = {name: entry.options.make_pattern() for name, entry in METHODS.items()}
    return [name for name, pattern in patterns.items() if pattern and pattern.has_layout]
