"""A prepared data set is whole and what its name promises, or one line says what to do."""

import json
import shutil

import data_files as files
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import prepare_data, train
from experiments.data import load, streaming, tfds_layout
from experiments.data.images import png
from experiments.prepare_data import Config

COMMAND = "with --overwrite: python -m experiments.prepare_data --dataset cifar10 --source PATH"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    source = files.npz_source("cifar10", files.arrays_for("cifar10"), root)
    prepare_data.main(Config(dataset="cifar10", source=source, data_dir=root / "data"))
    return root / "data"


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of the data folder, and in it the folder of the version."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data", tfds_layout.prepared_versions("cifar10", tmp_path / "data")[0]


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def clear(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(max(300, path.stat().st_size)))


def invert(path):
    """Inverts a byte in the middle of an image."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 1000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("dataset_info.json", lose, "dataset_info.json is missing"),
        ("dataset_info.json", cut, "dataset_info.json or features.json is damaged"),
        ("dataset_info.json", clear, "dataset_info.json or features.json is damaged"),
        ("dataset_info.json", noise, "dataset_info.json or features.json is damaged"),
        ("features.json", lose, "dataset_info.json or features.json is damaged"),
        ("features.json", cut, "dataset_info.json or features.json is damaged"),
        ("features.json", noise, "dataset_info.json or features.json is damaged"),
        ("*train.array_record*", lose, r"cifar10-train.array_record-\S+ is missing"),
        ("*train.array_record*", cut, r"cifar10-train.array_record-\S+ is cut or damaged"),
        ("*test.array_record*", cut_a_byte, r"cifar10-test.array_record-\S+ is cut or damaged"),
        ("*train.array_record*", clear, r"cifar10-train.array_record-\S+ is cut or damaged"),
        ("*train.array_record*", noise, r"cifar10-train.array_record-\S+ is cut or damaged"),
        ("*train.array_record*", invert, "examples 0 to 11 of train cannot be read"),
    ],
)
def test_lost_and_cut_files_end_training_with_one_line(pattern, damage, message, copied, capsys):
    data_dir, folder = copied
    damage(next(folder.glob(pattern)))
    with pytest.raises(
        ValueError, match=rf"^data_dir: '{folder}': .*{message}.*{COMMAND}"
    ) as error:
        load("cifar10", data_dir)
    assert "\n" not in str(error.value)
    run = data_dir.parent / "run"
    arguments = ["--dataset", "cifar10", "--data-dir", str(data_dir), "--out", str(run)]
    with pytest.raises(SystemExit) as stop:
        train.cli(["--method", "dense", "--model", "cnn", "--epochs", "1", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: data_dir: '{folder}': ")


def rewrite(folder, file, change):
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def features(content):
    return content["featuresDict"]["features"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(shardLengths=["13"]),
            r"expected 13 examples in \S+, got 12",
        ),
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(shardLengths=["11"]),
            r"expected 11 examples in \S+, got 12",
        ),
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(shardLengths=["0"]),
            "the split 'train' has no examples",
        ),
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(shardLengths=[]),
            "the split 'train' has no examples",
        ),
        ("dataset_info.json", lambda c: c["splits"].pop(0), r"a split 'train', got .*\['test'\]"),
        (
            "features.json",
            lambda c: features(c)["label"]["classLabel"].update(numClasses="100"),
            "labels of 10 classes, got .*num_classes=100",
        ),
        (
            "features.json",
            lambda c: features(c)["image"]["image"]["shape"].update(dimensions=["28", "28", "1"]),
            r"expected uint8 images \[32, 32, 3\] .*got Image\(shape=\(28, 28, 1\)",
        ),
        (
            "features.json",
            lambda c: features(c)["image"]["image"].update(dtype="uint16"),
            "expected uint8 images .*got Image.*uint16",
        ),
        ("features.json", lambda c: features(c).pop("label"), "expected .* and None"),
    ],
)
def test_metadata_of_another_data_set_are_refused(file, change, message, copied):
    data_dir, folder = copied
    rewrite(folder, file, change)
    with pytest.raises(ValueError, match=rf"{message}.*{COMMAND}") as error:
        load("cifar10", data_dir)
    assert "\n" not in str(error.value)


def test_another_data_set_under_this_name_is_refused(copied, tmp_path):
    data_dir, folder = copied
    shutil.copytree(folder, data_dir / "cifar100" / folder.name)
    with pytest.raises(ValueError, match=r"labels of 100 classes, got .*num_classes=10"):
        load("cifar100", data_dir)


def test_a_file_in_the_place_of_another_is_refused(copied):
    data_dir, folder = copied
    shutil.copy(next(folder.glob("*test.array*")), next(folder.glob("*train.array*")))
    with pytest.raises(ValueError, match=r"expected 12 examples in .*train.*, got 5"):
        load("cifar10", data_dir)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"image": png(np.zeros((1, 1, 3), np.uint8)), "label": 0},
            r"example 1 of train: expected an image \[32, 32, 3\], got \[1, 1, 3\]",
        ),
        (
            {"image": png(np.zeros((32, 32, 3), np.uint8))[:60], "label": 0},
            "example 1 of train: image: expected PNG or JPEG bytes, got 60 bytes",
        ),
        ({"label": 10}, "example 1 of train: expected a label 0 to 9, got 10"),
        ({"label": -1}, "example 1 of train: expected a label 0 to 9, got -1"),
    ],
)
def test_examples_are_checked_when_a_set_is_opened(example, message, tmp_path, monkeypatch):
    good = {"image": png(np.zeros((32, 32, 3), np.uint8)), "label": 0, "id": "a"}
    examples = [("train", good), ("train", good | example), ("test", good)]
    # TFDS's writer checks some of this too; another program's may not.
    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda self, label: label)
    tfds_layout.write("cifar10", tmp_path, examples, {})
    with pytest.raises(ValueError, match=f"data_dir: cifar10, {message}.*--overwrite") as error:
        load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


def test_streamed_examples_are_checked_when_they_are_read():
    image = files.jpeg(np.zeros((8, 8, 3), np.uint8))
    for example, message in (
        ({"image": image, "label": 1000}, "expected a label 0 to 999, got 1000"),
        ({"image": image[:50], "label": 0}, "expected PNG or JPEG bytes, got 50 bytes"),
    ):
        source = [example | {"file_name": b"n1_7.JPEG"}]
        data = streaming.ImageNet(source, source, threads=1)
        for batches in (data.train_batches(0, 1, seed=0), data.test_batches(1)):
            with pytest.raises(ValueError, match=f"imagenet2012, n1_7.JPEG: .*{message}"):
                next(iter(batches))


def test_a_data_set_that_lost_its_metadata_is_prepared_again(copied, tmp_path):
    data_dir, folder = copied
    (folder / "dataset_info.json").unlink()
    arrays = files.arrays_for("cifar10", train=3)
    source = files.npz_source("cifar10", arrays, tmp_path)
    with pytest.raises(ValueError, match="exists already; pass --overwrite"):
        prepare_data.main(Config(dataset="cifar10", source=source, data_dir=data_dir))
    prepare_data.main(Config(dataset="cifar10", source=source, data_dir=data_dir, overwrite=True))
    np.testing.assert_array_equal(load("cifar10", data_dir).train.x, arrays["x_train"])
