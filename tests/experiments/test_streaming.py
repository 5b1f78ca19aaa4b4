"""ImageNet, from tars like the official ones to batches: deterministic, resumable, and the same for
any number of processes.
"""

import dataclasses
import io
import shutil
import tarfile

import cv2
import data_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import prepare_data
from experiments.data import load, streaming, tfds_layout
from experiments.data.images import decode, png
from experiments.prepare_data import Config

LABELS = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
ANSWERS = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """A folder of tars like the official ones: two classes of 10 images, and 7 validation images.

    Image i is grey, of the value 10 i; the second class goes on at 100.
    """
    folder = tmp_path_factory.mktemp("imagenet")

    def image(value, i, **kw):
        return files.jpeg(np.full((60 + 7 * i, 90 - 5 * i, 3), value, np.uint8), **kw)

    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, wnid in enumerate(LABELS[3:5]):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for i in range(10):
                    special = {0: {"fmt": "PNG"}, 1: {"mode": "CMYK"}, 2: {"mode": "L"}}.get(i, {})
                    files.add(inner, f"{wnid}_{i}.JPEG", image(100 * c + 10 * i, i, **special))
            files.add(outer, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in (3, 0, 1, 2, 6, 5, 4):
            files.add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", image(10 * i, i))
    summary = prepare_data.main(Config(dataset="imagenet2012", source=folder, data_dir=folder))
    assert summary.counts == {"train": 20, "validation": 7}
    return folder


def test_imagenet_files(imagenet_dir):
    source = tfds.data_source("imagenet2012", split="train", data_dir=imagenet_dir, download=False)
    assert [source.dataset_info.features["label"].names[e["label"]] for e in source] == [
        LABELS[3]
    ] * 10 + [LABELS[4]] * 10
    raw = tfds_layout.open_split("imagenet2012", imagenet_dir, "train")
    for i, example in enumerate(raw):
        with Image.open(io.BytesIO(example["image"])) as image:  # PNG and CMYK repaired
            assert image.format == "JPEG"
            assert image.mode == ("L" if i % 10 == 2 else "RGB")
        np.testing.assert_allclose(decode(example["image"], 3).astype(int), 10 * i, atol=2)
        assert example["file_name"] == f"{LABELS[3 + i // 10]}_{i % 10}.JPEG".encode()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_imagenet_train(imagenet_dir, workers):
    d = load("imagenet2012", imagenet_dir, threads=2, workers=workers)
    assert d.steps_per_epoch(6) == 3
    epoch = list(d.train_batches(1, 6, seed=5))
    assert len(epoch) == 3
    numbers = []
    for x, y in epoch:
        assert (x.shape, x.dtype, y.shape, y.dtype) == (
            (6, 224, 224, 3),
            jnp.float32,
            (6,),
            jnp.int32,
        )
        values = np.round(files.pixels(d.name, x).mean((1, 2, 3)) / 10).astype(int)
        np.testing.assert_array_equal(3 + values // 10, y)
        numbers += values.tolist()
    assert len(set(numbers)) == 18
    for a, b in zip(epoch[1:], d.train_batches(1, 6, seed=5, start_step=1), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert any(
        (a != b).any() for (a, _), (b, _) in zip(epoch, d.train_batches(2, 6, seed=5), strict=True)
    )
    for p in range(2):
        part = dataclasses.replace(d, process=(p, 2)).train_batches(1, 6, seed=5)
        for a, b in zip(epoch, part, strict=True):
            jax.tree.map(lambda u, v, p=p: np.testing.assert_array_equal(u[p::2], v), a, b)


def test_imagenet_test_batches_give_every_example_once(imagenet_dir):
    d = load("imagenet2012", imagenet_dir, threads=2)
    batches = list(d.test_batches(4))
    weights = np.concatenate([w for _, _, w in batches])
    assert weights.tolist() == [1] * 7 + [0]
    values = np.concatenate([files.pixels(d.name, x).mean((1, 2, 3)) for x, _, _ in batches]) / 10
    np.testing.assert_array_equal(np.round(values[:7]), [3, 0, 1, 2, 6, 5, 4])
    labels = np.concatenate([y for _, y, _ in batches])[:7]
    assert [LABELS[y] for y in labels] == [ANSWERS[i] for i in (3, 0, 1, 2, 6, 5, 4)]
    for p in range(2):
        for a, b in zip(
            batches, dataclasses.replace(d, process=(p, 2)).test_batches(4), strict=True
        ):
            jax.tree.map(lambda u, v, p=p: np.testing.assert_array_equal(u[p::2], v), a, b)


@pytest.mark.parametrize(
    ("file", "member", "message"),
    [
        ("ILSVRC2012_img_train.tar", "n00000000.tar", "n00000000.tar is no class of ImageNet 2012"),
        ("ILSVRC2012_img_train.tar", f"{LABELS[0]}.tar", "corrupted or not the folder"),
        (
            "ILSVRC2012_img_val.tar",
            "ILSVRC2012_val_00050001.JPEG",
            "got ILSVRC2012_val_00050001.JPEG",
        ),
        (
            "ILSVRC2012_img_val.tar",
            "ILSVRC2012_val_00000001.JPEG",
            "expected a JPEG image, got 5 bytes",
        ),
    ],
)
def test_bad_imagenet(imagenet_dir, file, member, message, tmp_path):
    for archive in imagenet_dir.glob("*.tar"):
        shutil.copy(archive, tmp_path)
    with tarfile.open(tmp_path / file, "a") as tar:
        files.add(tar, member, b"noise")
    with pytest.raises(ValueError, match=message):
        prepare_data.main(
            Config(dataset="imagenet2012", source=tmp_path, data_dir=tmp_path / "out")
        )
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        prepare_data.main(
            Config(dataset="imagenet2012", source=tmp_path, data_dir=tmp_path / "out")
        )


def class_archive(names, cut=None):
    """A tar of one class with one image under each name, or its first bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            files.add(tar, name, files.jpeg(np.zeros((9, 9, 3), np.uint8)))
    return buffer.getvalue()[:cut]


def test_companions_and_dangling_links_are_no_images(imagenet_dir, tmp_path):
    archive = class_archive([f"{LABELS[9]}_1.JPEG", f"._{LABELS[9]}_1.JPEG", ".DS_Store"])
    link = tarfile.TarInfo(f"{LABELS[9]}_2.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "nowhere"
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        files.add(tar, f"._{LABELS[9]}.tar", b"\0\5\26\7")
        files.add(tar, f"{LABELS[9]}.tar", archive)
        tar.addfile(link)
    shutil.copy(imagenet_dir / "ILSVRC2012_img_val.tar", tmp_path)
    summary = prepare_data.main(
        Config(dataset="imagenet2012", source=tmp_path, data_dir=tmp_path / "out")
    )
    assert summary.counts == {"train": 1, "validation": 7}


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (class_archive(["a.JPEG", "b.JPEG"], cut=1536), "truncated|end|empty"),
        (class_archive(["a.JPEG", "b.JPEG"], cut=700), "unexpected end of data"),
        (class_archive(["a.JPEG", "a.JPEG"]), "a.JPEG is in it twice"),
    ],
)
def test_a_damaged_class_is_named(archive, message, imagenet_dir, tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        files.add(tar, f"{LABELS[9]}.tar", archive)
    shutil.copy(imagenet_dir / "ILSVRC2012_img_val.tar", tmp_path)
    expected = rf"img_train.tar/{LABELS[9]}.tar' is corrupted or not .*\(.*({message})"
    with pytest.raises(ValueError, match=expected) as error:
        prepare_data.main(
            Config(dataset="imagenet2012", source=tmp_path, data_dir=tmp_path / "out")
        )
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_random_resized_crop_statistics():
    """The crops lie inside of the image, have the documented areas and aspects, and half are
    mirrored.
    """
    h, w = 80, 120
    image = np.zeros((h, w, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(h)[:, None], np.arange(w)
    rng = np.random.default_rng(0)
    crops = np.stack([streaming.random_resized_crop(rng, image, 16) for _ in range(1000)]).astype(
        float
    )
    height = (crops[:, -1, 0, 0] - crops[:, 0, 0, 0]) * 16 / 15
    width = (crops[:, 0, -1, 1] - crops[:, 0, 0, 1]) * 16 / 15
    area, aspect = height * abs(width) / (h * w), abs(width) / height
    assert 0.05 < area.min() < 0.12
    assert 0.85 < area.max() < 1.05
    assert 0.65 < aspect.min() < 0.82
    assert 1.22 < aspect.max() < 1.55
    assert 0.44 < (width < 0).mean() < 0.56
    wide = np.zeros((4, 400, 3), np.uint8)  # no crop fits, so it is the centred square
    wide[:, 198:202] = 255
    assert streaming.random_resized_crop(rng, wide, 8, area=(1.0, 1.0)).min() == 255


def test_center_crop():
    image = np.zeros((60, 100, 3), np.uint8)
    image[..., 0] = np.arange(100)
    crop = streaming.center_crop(image, 40, shorter=50)
    assert crop.shape == (40, 40, 3)
    np.testing.assert_allclose(crop[0, :, 0], np.arange(40) * 1.2 + 26, atol=1.5)  # centred
    assert streaming.center_crop(image.transpose(1, 0, 2), 40, shorter=50).shape == (40, 40, 3)


def test_undecodable_image():
    with pytest.raises(ValueError, match="expected PNG or JPEG bytes, got 5 bytes"):
        decode(b"noise", 3)
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    np.testing.assert_array_equal(decode(png(grey), 1), grey)
    assert cv2.getNumThreads() == 1  # the loader's threads already use all cores
