"""Every source format is converted and read back; wrong and corrupted sources are refused; a data
set is written completely or not at all.
"""

import dataclasses
import itertools
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import data_files as files
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import prepare_data
from experiments.data import load, tfds_layout
from experiments.data.images import png
from experiments.data.specs import SPECS
from experiments.data.work_folder import work_folder
from experiments.prepare_data import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mnist", files.idx_source),
        ("mnist", files.unpacked_idx_source),
        ("mnist", files.keras_source),
        ("cifar10", files.cifar_tar_source),
        ("cifar10", files.cifar_folder_source),
        ("cifar10", files.keras_source),
        ("cifar100", files.cifar_tar_source),
        ("cifar100", files.npz_source),
        ("tiny_imagenet", files.tiny_folder_source),
        ("tiny_imagenet", files.tiny_zip_source),
        ("tiny_imagenet", files.npz_source),
    ],
)
def test_round_trip(name, make, tmp_path, capsys):
    arrays = files.arrays_for(name)
    source = tmp_path / "source"
    source.mkdir()
    path = make(name, arrays, source)
    summary = prepare_data.main(Config(dataset=name, source=path, data_dir=tmp_path / "out"))
    assert summary.counts == {"train": 12, SPECS[name].test_split: 5}
    assert "12 examples (the official set has" in capsys.readouterr().out
    # no temporary folder stays
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    loaded = load(name, tmp_path / "out")
    assert (loaded.name, loaded.image_shape, loaded.num_classes) == (
        name,
        SPECS[name].image_shape,
        SPECS[name].num_classes,
    )
    for split in ("train", "test"):
        x, y = getattr(loaded, split)
        assert (x.dtype, y.dtype) == (jnp.uint8, jnp.int32)
        # the JPEG decoders of OpenCV and PIL differ by up to two values
        atol = 2 if "tiny" in name and make is not files.npz_source else 0
        np.testing.assert_allclose(np.asarray(x, int), arrays[f"x_{split}"], atol=atol)
        np.testing.assert_array_equal(y, arrays[f"y_{split}"])


def test_tfds_itself_reads_it(tmp_path):
    arrays = files.arrays_for("cifar100")
    prepare_data.main(
        Config(
            dataset="cifar100",
            source=files.cifar_tar_source("cifar100", arrays, tmp_path),
            data_dir=tmp_path,
        )
    )
    source = tfds.data_source("cifar100", split="test", data_dir=tmp_path, download=False)
    assert len(source) == 5
    for i, example in enumerate(source):
        np.testing.assert_array_equal(example["image"], arrays["x_test"][i])
        assert (example["label"], example["coarse_label"]) == (
            arrays["y_test"][i],
            arrays["y_test"][i] // 5,
        )
        assert example["id"] == f"test_{i:05d}".encode()
    assert source.dataset_info.features["label"].names[7] == "class 7"


# --- bad sources


def bad_npz(key, value):
    def change(arrays):
        arrays[key] = value(arrays[key])
        return arrays

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"images": a["x_train"]}, "missing: x_train, y_train, x_test, y_test"),
        (
            bad_npz("x_test", lambda x: x / np.float32(255)),
            r"x_test: expected uint8 \[n, 32, 32, 3\].*got float32",
        ),
        (
            bad_npz("x_train", lambda x: x.transpose(0, 3, 1, 2)),
            r"x_train: .*got uint8 \[12, 3, 32, 32\]",
        ),
        (bad_npz("y_train", lambda y: y + 1.0), "y_train: expected 12 integers.*float64"),
        (bad_npz("y_train", lambda y: y[:-1]), r"y_train: expected 12 integers.*\[11\]"),
        (bad_npz("y_test", lambda y: y * 0 + 10), "y_test: expected labels 0 to 9, got 10 to 10"),
        (bad_npz("y_test", lambda y: y * 0 - 1), "y_test: expected labels 0 to 9, got -1 to -1"),
    ],
)
def test_wrong_arrays(change, message, tmp_path):
    path = files.npz_source("cifar10", change(files.arrays_for("cifar10")), tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare_data.main(Config(dataset="cifar10", source=path, data_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("cifar10", files.npz_source, "arrays.npz"),
        ("cifar10", files.cifar_tar_source, "cifar-python.tar.gz"),
        ("cifar10", files.cifar_folder_source, "cifar-10-batches-py/test_batch"),
        ("mnist", files.idx_source, "t10k-images-idx3-ubyte.gz"),
        ("mnist", files.unpacked_idx_source, "train-labels-idx1-ubyte"),
        ("tiny_imagenet", files.tiny_zip_source, "tiny-imagenet-200.zip"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_corrupted_source(name, make, file, damage, tmp_path):
    path = make(name, files.arrays_for(name), tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(
        content[: len(content) // 2] if damage == "cut" else files.RNG.bytes(len(content))
    )
    with pytest.raises(ValueError, match=r"corrupted or not .*fetch it again"):
        prepare_data.main(Config(dataset=name, source=path, data_dir=tmp_path / "out"))


def test_pickles_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    path = files.cifar_folder_source("cifar10", files.arrays_for("cifar10"), tmp_path)
    (path / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"unexpected .* in the pickle"):
        prepare_data.main(Config(dataset="cifar10", source=path, data_dir=tmp_path / "out"))
    assert not (tmp_path / "touched").exists()


def test_incomplete_sources(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="nowhere' does not exist; expected the folder of the four idx files",
    ):
        prepare_data.main(
            Config(dataset="mnist", source=tmp_path / "nowhere", data_dir=tmp_path / "out")
        )
    path = files.idx_source("mnist", files.arrays_for("mnist"), tmp_path)
    (path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*complete source"):
        prepare_data.main(Config(dataset="mnist", source=path, data_dir=tmp_path / "out"))
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        prepare_data.main(Config(dataset="cifar1O", source=path, data_dir=tmp_path / "out"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="imagenet2012 needs a registration"):
        prepare_data.main(Config(dataset="imagenet2012", data_dir=tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wnids.txt", b"n1 n2", "expected 200 different WordNet ids, got 2"),
        (
            "val/images/val_0.JPEG",
            files.jpeg(np.zeros((32, 64, 3), np.uint8)),
            "expected 64 x 64 pixels, got 32 x 64",
        ),
        ("val/images/val_0.JPEG", b"text", "expected a JPEG image, got 4 bytes"),
        ("val/images/val_0.JPEG", None, "the image is missing"),
    ],
)
def test_bad_tiny_imagenet(file, content, message, tmp_path):
    path = files.tiny_folder_source("tiny_imagenet", files.arrays_for("tiny_imagenet"), tmp_path)
    target = path / "tiny-imagenet-200" / file
    target.write_bytes(content) if content else target.unlink()
    with pytest.raises(ValueError, match=message):
        prepare_data.main(Config(dataset="tiny_imagenet", source=path, data_dir=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


def test_overwrite_replaces_only_when_complete(tmp_path):
    def prepare(arrays, **kw):
        path = files.npz_source("mnist", arrays, tmp_path)
        return prepare_data.main(
            Config(dataset="mnist", source=path, data_dir=tmp_path / "out", **kw)
        )

    first, second = files.arrays_for("mnist"), files.arrays_for("mnist", train=7)
    prepare(first)
    with pytest.raises(ValueError, match="exists already; pass --overwrite"):
        prepare(second)

    def breaks():
        yield "train", {"image": png(first["x_train"][0]), "label": 0}
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        tfds_layout.write("mnist", tmp_path / "out", breaks(), {}, overwrite=True)
    with pytest.raises(ValueError, match="got none of test"):
        tfds_layout.write(
            "mnist", tmp_path / "out", itertools.islice(breaks(), 1), {}, overwrite=True
        )
    np.testing.assert_array_equal(load("mnist", tmp_path / "out").train.x, first["x_train"])
    prepare(second, overwrite=True)
    np.testing.assert_array_equal(load("mnist", tmp_path / "out").train.x, second["x_train"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mnist"]


def prepare_mnist(tmp_path, arrays, **options):
    source = files.npz_source("mnist", arrays, tmp_path)
    return prepare_data.main(
        Config(dataset="mnist", source=source, data_dir=tmp_path / "out", **options)
    )


SLEEPER = """
import sys, time
from experiments.data import tfds_layout
from experiments.data.images import png
import numpy as np

def examples():
    for i in range(600):
        yield "train", {"image": png(np.zeros((28, 28, 1), np.uint8)), "label": 0}
    print("writing", flush=True)
    time.sleep(600)

tfds_layout.write("mnist", sys.argv[1], examples(), {})
"""


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    arrays = files.arrays_for("mnist")
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, out], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            # while it runs the folder is its own
            with pytest.raises(ValueError, match=r"another process works in .*mnist.partial'"):
                prepare_mnist(tmp_path, arrays)
        finally:
            process.kill()
    (left,) = out.iterdir()
    assert list(left.rglob("*.array_record*"))
    with pytest.raises(FileNotFoundError, match="no mnist in"):
        load("mnist", out)
    prepare_mnist(tmp_path, arrays)
    assert [path.name for path in out.iterdir()] == ["mnist"]
    np.testing.assert_array_equal(load("mnist", out).train.x, arrays["x_train"])


def test_what_a_killed_download_left_is_removed_by_the_next(tmp_path, monkeypatch):
    arrays = files.arrays_for("mnist")
    server = tmp_path / "server"
    server.mkdir()
    files.idx_source("mnist", arrays, server)
    urls = tuple(path.as_uri() for path in sorted(server.iterdir()))
    monkeypatch.setitem(SPECS, "mnist", dataclasses.replace(SPECS["mnist"], urls=urls))
    left = tmp_path / "out" / ".mnist.download"
    (left / "folder").mkdir(parents=True)
    (left / "lock").touch()
    (left / "t10k-images-idx3-ubyte.gz").write_bytes(b"half of it")
    prepare_data.main(Config(dataset="mnist", data_dir=tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mnist"]


@pytest.mark.parametrize("killed", ["before", "between", "after"])
def test_a_copy_survives_a_kill_while_it_is_replaced(killed, tmp_path):
    """The old copy moves aside, the new one takes its place, the old one is removed."""
    first, second = files.arrays_for("mnist"), files.arrays_for("mnist", train=7)
    folder = prepare_mnist(tmp_path, first).folder
    aside = folder.with_name(folder.name + ".replaced")
    if killed == "between":
        folder.rename(aside)
    elif killed == "after":
        shutil.copytree(folder, aside)
    with pytest.raises(ValueError, match="exists already; pass --overwrite"):
        prepare_mnist(tmp_path, second)
    np.testing.assert_array_equal(load("mnist", tmp_path / "out").train.x, first["x_train"])
    prepare_mnist(tmp_path, second, overwrite=True)
    np.testing.assert_array_equal(load("mnist", tmp_path / "out").train.x, second["x_train"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_data_sets_are_prepared_side_by_side(tmp_path):
    with work_folder(tmp_path / "out/.cifar10.partial"):
        prepare_mnist(tmp_path, files.arrays_for("mnist"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mnist"]


def test_download(tmp_path, monkeypatch):
    """`download=True` fetches the archive of the spec; here from file:// addresses."""
    arrays = files.arrays_for("mnist")
    server = tmp_path / "server"
    server.mkdir()
    files.idx_source("mnist", arrays, server)
    urls = tuple(path.as_uri() for path in sorted(server.iterdir()))
    monkeypatch.setitem(SPECS, "mnist", dataclasses.replace(SPECS["mnist"], urls=urls))
    loaded = load("mnist", tmp_path / "out", download=True)
    np.testing.assert_array_equal(loaded.train.x, arrays["x_train"])
    shutil.rmtree(server)
    np.testing.assert_array_equal(
        load("mnist", tmp_path / "out", download=True).test.y, arrays["y_test"]
    )
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched.*pass --source"):
        load("mnist", tmp_path / "other", download=True)


def test_the_command_line_names_itself_and_ends_wrong_input_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.cli(["--help"])
    assert stop.value.code == 0
    assert "python -m experiments.prepare_data" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        prepare_data.cli(
            [
                "--dataset",
                "mnist",
                "--source",
                str(tmp_path / "none"),
                "--data-dir",
                str(tmp_path / "out"),
            ]
        )
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def unwritable(tmp_path, monkeypatch):
    """A data folder that is a file."""
    (tmp_path / "out").write_text("")


def unwritable_name(tmp_path, monkeypatch):
    """A data set's folder that is a file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mnist").write_text("")


def interrupted(tmp_path, monkeypatch):
    def write(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tfds_layout, "_write_records", write)


@pytest.mark.parametrize(
    ("trouble", "code", "message"),
    [
        (unwritable, 2, "error: data_dir: '.*out' cannot be written"),
        (unwritable_name, 2, "error: data_dir: '.*out' cannot be written"),
        (interrupted, 130, "stopped: nothing was written into .*out"),
    ],
)
def test_unwritable_folders_and_ctrl_c_end_with_one_line(
    trouble, code, message, tmp_path, monkeypatch, capsys
):
    trouble(tmp_path, monkeypatch)
    source = files.npz_source("mnist", files.arrays_for("mnist"), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--source", str(source), "--data-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        prepare_data.cli(["--dataset", "mnist", *arguments])
    assert stop.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line)
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "out"}


FULL_DISK = """
import resource, sys
from experiments import prepare_data

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
prepare_data.cli(["--dataset", "cifar10", "--source", sys.argv[1], "--data-dir", sys.argv[2]])
"""


def test_a_full_disk_ends_with_one_line(tmp_path):
    """Here files end at 100 kB, which array_record meets as it meets a full disk."""
    source = files.npz_source("cifar10", files.arrays_for("cifar10", train=60), tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, source, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert re.match(r"error: data_dir: '.*out.*' cannot be written \(.*too large", line)
    assert not list((tmp_path / "out").iterdir())
