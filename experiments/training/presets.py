"""The preset of each data set: what a `TrainConfig` takes for the fields left at None."""

from typing import Any

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
