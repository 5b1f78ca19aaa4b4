"""The presets: what a `TrainConfig` takes for the fields left at None."""

from typing import Any

from experiments.models.resnet import CIFAR_DEPTHS

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


def preset_of(dataset: str, model: str) -> dict[str, Any]:
    """The fields for a network on a data set.

    The ResNets for small images take the weight decay 1e-4 of He et al., CVPR 2016, section 4.2,
    which GraSP's code too has for ResNet-32 on CIFAR and Tiny ImageNet, beside 5e-4 for VGG-19
    (github.com/alecwangcq/GraSP, configs/).

    Example:
      >>> [preset_of("cifar10", model)["weight_decay"] for model in ("resnet32", "vgg19")]
      [0.0001, 0.0005]
    """
    fields = {"stem": "cifar"} | PRESETS[dataset]
    small_images = dataset in ("cifar10", "cifar100", "tiny_imagenet")
    return fields | {"weight_decay": 1e-4} if small_images and model in CIFAR_DEPTHS else fields
