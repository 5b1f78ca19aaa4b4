"""Archives in every state: what systems leave beside the data and links are no files of it, and a
cut, damaged, encrypted or over-large archive is refused by its name.
"""

import gzip
import io
import pickle
import random
import shutil
import stat
import tarfile
import zipfile

import data_files as files
import numpy as np
import pytest

from experiments.data import archives, array_files
from experiments.data.archives import open_files, tar_members
from experiments.data.sources import open_source

JUNK = {
    "._a.JPEG": b"\0\5\26\7",
    "__MACOSX/cifar/._data_batch_1": b"\0\5\26\7",
    ".DS_Store": b"Bud1",
    "train/Thumbs.db": b"thumbs",
    "train/desktop.ini": b"[x]",
    ".ipynb_checkpoints/data_batch_1": b"{}",
}


def read(name, path):
    with open_source(name, path) as source:
        return list(source.examples)


def link(tar, name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def zip_link(archive, name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, target)


def contents(path):
    with open_files(path) as opened:
        return {name: read() for name, read in opened.items()}


# --- what is skipped


def test_what_a_system_leaves_is_no_file_of_the_data(tmp_path):
    wanted = {"a.JPEG": b"a", "./train/b.JPEG": b"b"}
    folder = tmp_path / "folder"
    files.folder_source(wanted | JUNK, folder)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name, data in (wanted | JUNK).items():
            files.add(tar, name, data)
    with zipfile.ZipFile(tmp_path / "x.ZIP", "w") as archive:
        for name, data in (wanted | JUNK).items():
            archive.writestr(name, data)
    normal = {"a.JPEG": b"a", "train/b.JPEG": b"b"}
    assert contents(folder) == normal
    assert contents(tmp_path / "x.ZIP") == contents(tmp_path / "x.tar.gz") == wanted


def test_links_in_tars_lead_to_members_or_are_skipped(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link(tar, "d/early", "../late")
        files.add(tar, "late", b"data")
        link(tar, "hard", "late", tarfile.LNKTYPE)
        link(tar, "dangling", "nowhere")
        link(tar, "dangling hard", "nowhere", tarfile.LNKTYPE)
        link(tar, "outside", str(outside))
        link(tar, "up", "../outside")
        link(tar, "self", "self")
        link(tar, "one", "two")
        link(tar, "two", "one")
        link(tar, "device", "", tarfile.CHRTYPE)
        link(tar, "pipe", "", tarfile.FIFOTYPE)
        link(tar, "folder", "", tarfile.DIRTYPE)
    assert contents(tmp_path / "x.tar") == {"d/early": b"data", "late": b"data", "hard": b"data"}


def test_links_in_zips_lead_to_members_or_are_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        zip_link(archive, "d/early", "../late")
        archive.writestr("late", b"data")
        zip_link(archive, "dangling", "nowhere")
        zip_link(archive, "outside", "/etc/hostname")
        zip_link(archive, "self", "self")
    assert contents(tmp_path / "x.zip") == {"d/early": b"data", "late": b"data"}


def test_links_in_folders_are_followed_once(tmp_path):
    real = tmp_path / "elsewhere"
    files.folder_source({"b/x": b"x"}, real)
    folder = tmp_path / "folder"
    files.folder_source({"a": b"a"}, folder)
    (folder / "b").symlink_to(real / "b")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "linked").symlink_to("a")
    assert contents(folder) == {"a": b"a", "linked": b"a", "b/x": b"x"}


def test_nothing_is_written_wherever_the_names_lead(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    arrays = files.arrays_for("cifar10")
    source = files.cifar_tar_source("cifar10", arrays, inside)
    with tarfile.open(source) as tar:
        batches = {entry.name: tar.extractfile(entry).read() for entry in tar}
    with tarfile.open(source, "w:gz") as tar:
        for name, data in batches.items():
            files.add(tar, f"../../{name}", data)
        files.add(tar, f"{tmp_path}/absolute", b"x")
        files.add(tar, "../../traversal", b"x")
    before = sorted(tmp_path.rglob("*"))
    assert len(read("cifar10", source)) == 17
    assert sorted(tmp_path.rglob("*")) == before


# --- what is refused


def tar_bytes(n=4):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(n):
            files.add(tar, f"{i}.JPEG", bytes([i]) * 600)  # a header and two blocks each
    return buffer.getvalue()


@pytest.mark.parametrize("cut", [0, 100, 512, 1100, 1536, 1700, 2048, 4 * 1536])
def test_cut_tars_are_never_short(cut):
    """Also where the cut is between two files, which Python takes for the end."""
    with pytest.raises(tarfile.TarError):
        list(tar_members(io.BytesIO(tar_bytes()[:cut])))


@pytest.mark.parametrize("block", range(0, 12, 3))
def test_damaged_headers_are_not_the_end_of_a_tar(block):
    data = bytearray(tar_bytes())
    data[512 * block + 3] ^= 255
    with pytest.raises(tarfile.TarError):
        list(tar_members(io.BytesIO(data)))


def test_the_checksum_of_a_compressed_tar_is_read(tmp_path):
    data = bytearray(gzip.compress(tar_bytes()))
    data[-6] ^= 255
    (tmp_path / "x.tar.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.tar.gz' is corrupted or not .*CRC"):
        read("cifar10", tmp_path / "x.tar.gz")


def test_a_name_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        files.add(tar, "data_batch_1", b"1")
        files.add(tar, "data_batch_1", b"2")
    with pytest.raises(ValueError, match=r"x.tar' is corrupted .*data_batch_1 is in it twice"):
        read("cifar10", tmp_path / "x.tar")


def encrypt(path, member):
    """Sets the flag of encryption in the local header of a member and in the directory."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo(member).header_offset + 6] |= 1
    name = member.encode()
    data[data.rindex(name) - 46 + 8] |= 1
    path.write_bytes(data)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = files.tiny_zip_source("tiny_imagenet", files.arrays_for("tiny_imagenet"), tmp_path)
    encrypt(path, "tiny-imagenet-200/val/images/val_3.JPEG")
    message = r"source: .*tiny-imagenet-200.zip: .*val_3.JPEG is encrypted; extract .* password"
    with pytest.raises(ValueError, match=message):
        read("tiny_imagenet", path)


def test_an_encrypted_npz_is_refused(tmp_path):
    path = files.npz_source("mnist", files.arrays_for("mnist"), tmp_path)
    encrypt(path, "y_test.npy")
    with pytest.raises(ValueError, match=r"arrays.npz' is corrupted or not .*encrypted"):
        read("mnist", path)


def test_a_compression_that_python_lacks_is_refused(tmp_path):
    path = files.tiny_zip_source("tiny_imagenet", files.arrays_for("tiny_imagenet"), tmp_path)
    data = bytearray(path.read_bytes())
    name = b"tiny-imagenet-200/wnids.txt"
    data[data.rindex(name) - 46 + 10] = 9  # deflate64
    data[data.index(name) - 30 + 8] = 9
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is corrupted or not .*wnids.txt: .*not supported"):
        read("tiny_imagenet", path)


@pytest.mark.parametrize("kind", ["tar", "tars", "zip", "folder", "gzip", "npz"])
def test_over_large_files_are_refused(kind, tmp_path, monkeypatch):
    for module in (archives, array_files):
        monkeypatch.setattr(module, "MAX_BYTES", 1000)
    path, many = tmp_path / f"x.{kind}", bytes(1001)
    if kind in ("tar", "tars"):
        with tarfile.open(path, "w") as tar:
            for i in range(2):
                files.add(tar, f"data_batch_{i}", many if kind == "tar" else many[:600])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data_batch_1", many)
    elif kind == "npz":
        np.savez_compressed(path, x_train=np.frombuffer(many, np.uint8))
    elif kind == "folder":
        files.folder_source({"data_batch_1": many}, path)
    else:
        name = "train-images-idx3-ubyte.gz"
        files.folder_source({name: gzip.compress(many)}, path)
    with pytest.raises(ValueError, match=r"source: '.*' holds more than 1,000 bytes"):
        read("mnist" if kind == "gzip" else "cifar10", path)


def test_arrays_whose_header_promises_too_much_are_refused(tmp_path):
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        npy, {"descr": "|u1", "fortran_order": False, "shape": (2**44, 32, 32, 3)}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x_train.npy", npy.getvalue() + bytes(100))
    with pytest.raises(ValueError, match=r"x.npz' is corrupted or not"):
        read("cifar10", tmp_path / "x.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    shutil.move(tmp_path / "x.npy", tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("x_train", b"text")
    np.savez(tmp_path / "z.npz", x_train=np.array([None]))
    for file in ("x.npz", "y.npz", "z.npz"):
        with pytest.raises(ValueError, match=rf"{file}' is corrupted or not"):
            read("cifar10", tmp_path / file)


def test_an_unreadable_source_is_refused(tmp_path):
    """Here the place of the archive is a folder, which root cannot read as a file either."""
    folder = tmp_path / "ILSVRC"
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (folder / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"img_train.tar' cannot be read \(.*directory"):
        read("imagenet2012", folder)


# --- files of each data set


def test_gzip_is_known_by_its_content(tmp_path):
    """Browsers unpack a .gz without renaming it, and other systems write .GZ."""
    arrays = files.arrays_for("mnist")
    for pack, end in ((bytes, ".gz"), (gzip.compress, ".GZ"), (gzip.compress, "")):
        folder = tmp_path / f"{pack.__name__}{end}"
        folder.mkdir()
        path = files.idx_source("mnist", arrays, folder, pack=pack, end=end)
        labels = [example["label"] for _, example in read("mnist", path)]
        assert labels == [*arrays["y_train"], *arrays["y_test"]]


def tiny(tmp_path, **changes):
    """The folder of Tiny ImageNet with changed files; None removes one."""
    content = files.tiny_files(files.arrays_for("tiny_imagenet"))
    for name, data in changes.items():
        name = f"tiny-imagenet-200/{name}"
        content[name] = data(content.get(name)) if callable(data) else data
    content = {name: data for name, data in content.items() if data is not None}
    return files.folder_source(content, tmp_path / "tiny")


IMAGE = files.jpeg(np.zeros((64, 64, 3), np.uint8))


def test_empty_class_folders_and_other_endings_change_no_label(tmp_path):
    wnid = files.WNIDS[7]
    path = tiny(tmp_path, **{f"train/{wnid}/images/{name}": IMAGE for name in ("x.JPG", "y.jpeg")})
    (path / "tiny-imagenet-200/train/n00000003/images").mkdir(parents=True, exist_ok=True)
    examples = read("tiny_imagenet", path)
    labels = {example["id"]: example["label"] for _, example in examples}
    assert labels["x.JPG"] == labels["y.jpeg"] == 7
    assert len(examples) == 19
    assert all(labels[name] == files.WNIDS.index(name[:9]) for name in labels if name[0] == "n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"train/{files.WNIDS[1]}/images/notes.txt": b"x"}, "images/notes.txt: expected a JPEG"),
        ({f"train/{files.WNIDS[1]}/images/x.JPEG": IMAGE[:500]}, "images/x.JPEG: expected a JPEG"),
        ({"train/n99999999/images/x.JPEG": IMAGE}, "class n99999999: .*not in wnids.txt"),
        ({"val/images/val_9.JPEG": IMAGE}, "val_9.JPEG is not in .*val_annotations.txt"),
        (
            {"val/val_annotations.txt": lambda text: text + text.splitlines()[0]},
            "val_annotations.txt, line 6: expected an image of its own",
        ),
        (
            {"val/val_annotations.txt": lambda text: text[: text.rindex(b"\tn0")]},
            "val_annotations.txt, line 5: expected an image of its own and its class",
        ),
        ({"val/val_annotations.txt": b"\xff\xfe\0"}, "val_annotations.txt: expected UTF-8 text"),
    ],
)
def test_bad_tiny_imagenet_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^source: .*{message}.*fetch it again$"):
        read("tiny_imagenet", tiny(tmp_path, **changes))


def test_windows_text_is_read(tmp_path):
    def windows(text):
        return b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")

    path = tiny(tmp_path, **{"wnids.txt": windows, "val/val_annotations.txt": windows})
    assert len(read("tiny_imagenet", path)) == 17


@pytest.mark.parametrize("meta", [7, {"label_names": 7}, {"label_names": [1, 2]}])
def test_bad_class_names_are_refused(meta, tmp_path):
    path = files.cifar_folder_source("cifar10", files.arrays_for("cifar10"), tmp_path)
    (path / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"is corrupted or not .*batches.meta: "):
        read("cifar10", path)


MAKERS = [
    ("mnist", files.idx_source),
    ("mnist", files.unpacked_idx_source),
    ("mnist", files.npz_source),
    ("cifar10", files.cifar_tar_source),
    ("cifar10", files.cifar_folder_source),
    ("tiny_imagenet", files.tiny_zip_source),
]


@pytest.mark.parametrize(("name", "make"), MAKERS)
def test_damage_anywhere_ends_with_one_line(name, make, tmp_path):
    """Whatever bytes change or are cut off, the files are read, or one line says what to do."""
    path = make(name, files.arrays_for(name, train=5, test=2), tmp_path)
    targets = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    draw = random.Random(0)
    for _ in range(25):
        target = draw.choice(targets)
        original = target.read_bytes()
        damaged = bytearray(original)
        for _ in range(draw.choice([1, 8])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        target.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        message = "source: "
        try:
            read(name, path)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        assert message.startswith("source: ")
        assert "\n" not in message
        target.write_bytes(original)
    assert len(read(name, path)) == 7
