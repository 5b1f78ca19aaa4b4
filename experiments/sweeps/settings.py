"""How the papers train their networks, and what the smaller scales change."""

import dataclasses
from typing import Any

from experiments.training.config import TrainConfig
from experiments.training.methods import Lottery, Options

SCALES = ("full", "cpu", "smoke")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a paper trains a network; fields as in `TrainConfig`.

    Attributes:
      source: of the values; "ours" names those that it leaves open.
    """

    source: str
    dataset: str
    model: str
    epochs: int
    batch_size: int
    lr: float
    lr_schedule: str
    weight_decay: float
    width: float = 1
    stem: str = "cifar"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0

    def config(
        self, method: str, sparsity: float | None = None, options: Options | None = None
    ) -> TrainConfig:
        """The run of a method."""
        fields = dataclasses.asdict(self)
        del fields["source"]
        return TrainConfig(method=method, sparsity=sparsity, options=options, **fields)


_GRASP = (
    "Ma et al., CPAL 2024: GraSP's networks, 160 epochs of batches of 128, 0.1 divided by 10 at "
    "epochs 80 and 120; weight decay of GraSP's configs (Wang et al., ICLR 2020)"
)
RESNET32 = Setting(_GRASP, "cifar10", "resnet32", 160, 128, 0.1, "step", 1e-4, width=2)
VGG19 = Setting(_GRASP, "cifar10", "vgg19", 160, 128, 0.1, "step", 5e-4)
HRBP_IMAGENET = Setting(
    "Ma et al., CPAL 2024: 90 epochs; batch, rate and decay are ours, the usual ones",
    *("imagenet2012", "resnet50", 90, 256, 0.1, "cosine", 1e-4),
    stem="imagenet",
)
CAMPFIRE_TINY = Setting(
    "Gamboa et al., 2020: 40 epochs, Adam 1e-3, 1e-4 after 30, batch 64, weight decay 1e-4",
    *("tiny_imagenet", "resnet50", 40, 64, 1e-3, "last-quarter", 1e-4),
    optimizer="adam",
)
CAMPFIRE_IMAGENET = Setting(
    "Gamboa et al., 2020: 90 epochs; batch, rate and decay are ours, the usual ones",
    *("imagenet2012", "resnet50_v1_5", 90, 256, 0.1, "step", 1e-4),
    stem="imagenet",
)
SR_STE = Setting(
    "Zhou et al., ICLR 2021: 120 epochs, batch 256, 0.1 cosine after 5 epochs of warm-up, decay "
    "5e-5; ours: no decay of 1-D parameters, and a dense stem",
    *("imagenet2012", "resnet50", 120, 256, 0.1, "cosine", 5e-5),
    stem="imagenet",
    warmup_epochs=5,
)
SUBP = Setting(
    "Xiang et al., NeurIPS 2023: batch 200, 0.1 cosine, decay 1e-4 not of 1-D parameters, label "
    "smoothing 0.1; 250 epochs are ours",
    *("imagenet2012", "resnet18", 250, 200, 0.1, "cosine", 1e-4),
    stem="imagenet",
    label_smoothing=0.1,
)
RIGL = Setting(
    "Evci et al., ICML 2020: 97,656 steps of 128, 0.1 divided by 5 at 30,000, 60,000 and 90,000, "
    "Nesterov momentum, decay 5e-4",
    *("cifar10", "resnet20", 250, 128, 0.1, "fifths", 5e-4),
    width=2,
    nesterov=True,
)
HAN = Setting(
    "Han et al., ICLR 2016: prune, retrain, share, Huffman; the network and its training are ours",
    *("cifar10", "vgg19", 160, 128, 0.1, "step", 5e-4),
)

# Ours, sized so that `hrbp-static` ends within 40 minutes on two cores.
_CPU_CIFAR: dict[str, Any] = {
    "dataset": "cifar10",
    "model": "vgg19",
    "width": 0.25,
    "examples": 10_000,
    "epochs": 3,
}
_CPU_MNIST: dict[str, Any] = {
    "dataset": "mnist",
    "model": "resnet20",
    "width": 1,
    "examples": 5_000,
    "epochs": 2,
}
_CPU: dict[str, Any] = {"stem": "cifar", "batch_size": 64, "lr_schedule": "cosine"}
_SMOKE: dict[str, Any] = {
    "dataset": "digits",
    "model": "cnn",
    "width": 1,
    "stem": "cifar",
    "epochs": 1,
    "batch_size": 128,
    "lr_schedule": "cosine",
    "weight_decay": 5e-4,
}


def at_scale(config: TrainConfig, scale: str) -> TrainConfig:
    """The run of a cell at a scale; all of ours but `full`.

    `cpu` trains VGG-19 of a quarter of the width on a part of CIFAR-10, and ResNet-20 on a part of
    MNIST in the place of all residual networks. `smoke` trains the CNN on digits for an epoch.
    Groups and runs of channels shrink with the width, so that a layer has as many as at full scale.
    Lottery tickets then prune once, in a run of twice the epochs.

    Args:
      config: of the full scale.
      scale: full, cpu or smoke.

    Returns:
      A config with the method and sparsity of the given one.
    """
    if scale == "full":
        return config
    fields = dict(_SMOKE)
    if scale == "cpu":
        fields = _CPU | (_CPU_CIFAR if config.model == "vgg19" else _CPU_MNIST)
        fields["options"] = _narrower(config.options, fields["width"] / config.width)
    fields |= {"warmup_epochs": 0.0, "lr": 0.05 if config.optimizer == "sgd" else 1e-3}
    if isinstance(config.options, Lottery):
        assert config.sparsity is not None
        fields["options"] = dataclasses.replace(config.options, prune_fraction=config.sparsity)
        fields["epochs"] *= 2
    return dataclasses.replace(config, **fields)


def _narrower(options: Options | None, ratio: float) -> Options | None:
    """The options for layers of a fraction of the channels."""
    if options is None:
        return None
    sizes = {
        name: max(1, round(ratio * getattr(options, name)))
        for name in ("group_size", "channel_block")
        if hasattr(options, name)
    }
    return dataclasses.replace(options, **sizes)
