"""Data on the device: batches are deterministic, resumable and complete; augmentation crops and
mirrors and does nothing else; missing data is explained.
"""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import data_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import prepare_data
from experiments.data import augment, load
from experiments.data.resident import Dataset, Split
from experiments.data.shown_name import shown_name
from experiments.data.specs import SPECS
from experiments.prepare_data import Config

ROOT = Path(__file__).resolve().parents[2]

# --- load


def test_missing_data_names_the_command(tmp_path):
    for name in ("mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet2012"):
        command = f"python -m experiments.prepare_data --dataset {name} --source PATH --data-dir"
        with pytest.raises(FileNotFoundError, match=f"{command} {tmp_path}\n"):
            load(name, tmp_path)
        with pytest.raises(ValueError, match=f"{command} DIR"):
            load(name)
    with pytest.raises(ValueError, match="'tiny-imagenet'; did you mean 'tiny_imagenet'"):
        load("tiny-imagenet", tmp_path)


def test_other_formats_are_refused(tmp_path):
    summary = prepare_data.main(
        Config(
            dataset="mnist",
            source=files.npz_source("mnist", files.arrays_for("mnist"), tmp_path),
            data_dir=tmp_path,
        )
    )
    meta = summary.folder / "dataset_info.json"
    meta.write_text(meta.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        ValueError,
        match=r"array_record.*got tfrecord(.|\n)*--overwrite(.|\n)*prepare_data --dataset mnist",
    ):
        load("mnist", tmp_path)


def test_digits():
    digits = load("digits")
    x, y, xt, yt = map(np.asarray, (*digits.train, *digits.test))
    assert x.shape == (1438, 8, 8, 1)
    assert xt.shape == (359, 8, 8, 1)
    assert (x.dtype, y.dtype) == (jnp.uint8, jnp.int32)
    assert int(x.min()) == 0
    assert int(x.max()) == 255
    assert len(np.unique(y)) == len(np.unique(yt)) == 10
    np.testing.assert_allclose(
        [np.mean(x) / 255, np.std(x) / 255],
        [*SPECS["digits"].mean, *SPECS["digits"].std],
        atol=1e-3,
    )
    again = load("digits")
    np.testing.assert_array_equal(again.train.x, x)  # the split is fixed


def test_a_part_of_the_training_set_is_the_same_each_time():
    whole, part = load("digits"), load("digits", examples=100)
    assert part.train.x.shape == (100, 8, 8, 1)
    assert len(part.test.x) == len(whole.test.x)
    np.testing.assert_array_equal(part.train.x, load("digits", examples=100).train.x)
    pairs = {(x.tobytes(), int(y)) for x, y in zip(*map(np.asarray, whole.train), strict=True)}
    assert all(
        (x.tobytes(), int(y)) in pairs for x, y in zip(*map(np.asarray, part.train), strict=True)
    )
    assert len(np.unique(part.train.y)) == 10
    with pytest.raises(ValueError, match="examples: expected at most 1438, got 1439"):
        load("digits", examples=1439)


def test_tables_call_a_copy_by_the_name_that_it_was_given(tmp_path):
    assert shown_name("cifar10", tmp_path) == "CIFAR-10"
    source = files.npz_source("cifar10", files.arrays_for("cifar10"), tmp_path)
    for name in ("CIFAR-10 (q75)", None):
        config = Config("cifar10", source, tmp_path / "d", overwrite=True, name=name)
        prepare_data.main(config)
        expected = f"{name or 'CIFAR-10'}, 10,000 of 50,000 images"
        assert shown_name("cifar10", tmp_path / "d", 10_000) == expected


def test_digits_need_neither_tfds_nor_opencv():
    code = (
        "import sys; from experiments.data import load; load('digits'); "
        "print({'cv2', 'PIL', 'grain', 'tensorflow_datasets'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


# --- batches


def numbered(name="cifar10", train=50, test=23, process=(0, 1)):
    """A data set in which image i is labelled i and has the value i in every pixel."""
    spec = SPECS[name]

    def split(n):
        y = np.arange(1, n + 1)
        return Split(
            jnp.asarray(np.broadcast_to(y[:, None, None, None], (n, *spec.image_shape)), jnp.uint8),
            jnp.asarray(y, jnp.int32),
        )

    return Dataset(name, split(train), split(test), process)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_train_batches(name):
    d = numbered(name)
    epoch = list(d.train_batches(3, 8, seed=1))
    assert len(epoch) == d.steps_per_epoch(8) == 6
    labels = np.concatenate([y for _, y in epoch])
    assert len(set(labels.tolist())) == 48  # without repetition
    for x, y in epoch:
        assert (x.shape, x.dtype, y.dtype) == (
            (8, *SPECS[name].image_shape),
            jnp.float32,
            jnp.int32,
        )
        # the image still belongs to the label
        np.testing.assert_array_equal(files.pixels(name, x).max((1, 2, 3)), y)
        np.testing.assert_array_equal(files.pixels(name, x)[:, 14, 14, 0], y)
    resumed = d.train_batches(3, 8, seed=1, start_step=4)
    for a, b in zip(epoch[4:], resumed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert list(d.train_batches(3, 8, seed=1, start_step=6)) == []
    for other in (d.train_batches(4, 8, seed=1), d.train_batches(3, 8, seed=2)):
        assert (np.concatenate([y for _, y in other]) != labels).any()


def test_processes_share_the_same_batches():
    whole = list(numbered().train_batches(0, 12, seed=0)), list(numbered().test_batches(12))
    for p in range(2):
        part = numbered(process=(p, 2))
        assert part.steps_per_epoch(12) == 4
        for batches, parts in zip(
            whole, (part.train_batches(0, 12, seed=0), part.test_batches(12)), strict=True
        ):
            for a, b in zip(batches, parts, strict=True):
                jax.tree.map(lambda u, v, p=p: np.testing.assert_array_equal(u[p::2], v), a, b)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        numbered(process=(0, 3)).train_batches(0, 8, seed=0)


@pytest.mark.parametrize("batch_size", [1, 8, 23, 40])
def test_test_batches_give_every_example_once(batch_size):
    batches = list(numbered().test_batches(batch_size))
    assert {x.shape[0] for x, _, _ in batches} == {batch_size}
    weights = np.concatenate([w for _, _, w in batches])
    labels = np.concatenate([y for _, y, _ in batches])
    assert labels[weights == 1].tolist() == list(range(1, 24))
    assert weights.sum() == 23
    for x, y, _ in batches:
        expected = np.broadcast_to(y[:, None, None, None], x.shape)  # not augmented
        np.testing.assert_array_equal(files.pixels("cifar10", x), expected)


def test_bad_batches():
    with pytest.raises(
        ValueError, match="batch_size: expected at most the 50 training examples, got 51"
    ):
        numbered().train_batches(0, 51, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        numbered().test_batches(0)
    with pytest.raises(
        ValueError, match="start_step: expected 0 to the 6 steps of an epoch, got 7"
    ):
        numbered().train_batches(0, 8, seed=0, start_step=7)


MODES = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_disable_jit": True,
    "jax_enable_checks": True,
}


def some_batches():
    """Two training batches with crops and mirrors, and the padded test batch, as NumPy arrays."""
    data = numbered(train=20)
    batches = [*data.train_batches(1, 8, seed=3), *data.test_batches(23)]
    return jax.tree.map(np.asarray, batches)


@pytest.mark.parametrize("modes", [*([mode] for mode in MODES), list(MODES)])
def test_batches_are_the_same_in_every_mode_of_jax(modes):
    expected = some_batches()
    before = {mode: getattr(jax.config, mode) for mode in modes}
    try:
        for mode in modes:
            jax.config.update(mode, MODES[mode])
        batches = some_batches()
    finally:
        for mode, value in before.items():
            jax.config.update(mode, value)
    for actual, wanted in zip(jax.tree.leaves(batches), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == wanted.dtype
        # without jit the product and the sum of the normalisation round one by one
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=5e-7)


def test_batches_transfer_nothing_implicitly():
    train, test = numbered().train_batches(0, 8, seed=0), numbered().test_batches(8)
    with jax.transfer_guard("disallow"):
        next(train), next(train), next(test)


# --- augmentation


def variants(image, pad, flip):
    """All crops of the zero-padded image, one by one."""
    h, w, _ = image.shape
    for mirrored in [image, image[:, ::-1]][: 1 + flip]:
        padded = np.pad(mirrored, ((pad, pad), (pad, pad), (0, 0)))
        for top, left in itertools.product(range(2 * pad + 1), repeat=2):
            yield padded[top : top + h, left : left + w].tobytes()


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (1, False), (2, True), (0, True)])
def test_augment_is_a_crop_of_the_padded_image(pad, flip):
    image = files.RNG.integers(1, 256, (5, 7, 3), dtype=np.uint8)
    images = jnp.asarray(np.broadcast_to(image, (2000, 5, 7, 3)))
    jitted = jax.jit(augment.augment, static_argnames=("pad", "flip"))
    out = np.asarray(jitted(jax.random.key(0), images, pad=pad, flip=flip))
    assert out.dtype == np.uint8
    assert out.shape == images.shape
    assert {o.tobytes() for o in out} == set(variants(image, pad, flip))


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_digits_are_never_mirrored(name):
    d = load("digits") if name == "digits" else numbered("mnist")
    if name == "mnist":
        d = dataclasses.replace(
            d,
            train=Split(jnp.asarray(files.arrays_for("mnist", train=50)["x_train"]), d.train.y),
        )
    spec = SPECS[name]
    assert not spec.flip
    allowed = {v for x in np.asarray(d.train.x) for v in variants(x, spec.pad, flip=False)}
    images, _ = next(d.train_batches(0, 50, seed=0))
    assert all(x.astype(np.uint8).tobytes() in allowed for x in files.pixels(name, images))
