"""Small copies of the original files of each data set.

Each function `..._source(name, arrays, folder)` writes the arrays into the folder and returns the
path that `prepare_data --source` takes.
"""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
from PIL import Image

from experiments.data.specs import SPECS

RNG = np.random.default_rng(0)
WNIDS = [f"n{i:08d}" for i in range(200)]


def arrays_for(name, train=12, test=5):
    spec = SPECS[name]
    arrays = {}
    for split, n in (("train", train), ("test", test)):
        arrays[f"x_{split}"] = RNG.integers(0, 256, (n, *spec.image_shape), dtype=np.uint8)
        arrays[f"y_{split}"] = RNG.integers(0, spec.num_classes, n)
    return arrays


def jpeg(pixels, fmt="JPEG", mode=None):
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, fmt)
    return out.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def npz_source(name, arrays, folder):
    path = folder / "arrays.npz"
    np.savez(path, **arrays)
    return path


def keras_source(name, arrays, folder):
    keras = {k: v[..., 0] if k[0] == "x" and v.shape[-1] == 1 else v for k, v in arrays.items()}
    return npz_source(name, {k: v[:, None] if k[0] == "y" else v for k, v in keras.items()}, folder)


def idx_source(name, arrays, folder, pack=gzip.compress, end=".gz"):
    for key, file in (("train", "train"), ("test", "t10k")):
        for values, kind in (
            (arrays[f"x_{key}"][..., 0], "images-idx3"),
            (arrays[f"y_{key}"].astype(np.uint8), "labels-idx1"),
        ):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{file}-{kind}-ubyte{end}").write_bytes(pack(header + values.tobytes()))
    return folder


def unpacked_idx_source(name, arrays, folder):
    return idx_source(name, arrays, folder, pack=bytes, end="")


def cifar_files(name, arrays):
    def batch(x, y):
        rows = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        if name == "cifar10":
            return {"data": rows, "labels": y.tolist()}
        return {"data": rows, "fine_labels": y.tolist(), "coarse_labels": (y // 5).tolist()}

    def python2(content):
        """A pickle with the module names of the official files."""
        return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")

    if name == "cifar10":
        xs, ys = np.array_split(arrays["x_train"], 5), np.array_split(arrays["y_train"], 5)
        files = {
            f"data_batch_{i}": batch(x, y) for i, (x, y) in enumerate(zip(xs, ys, strict=True), 1)
        }
        files |= {"test_batch": batch(arrays["x_test"], arrays["y_test"])}
        files |= {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
        return {f"cifar-10-batches-py/{k}": python2(v) for k, v in files.items()}
    files = {s: batch(arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test")}
    files["meta"] = {
        "fine_label_names": [f"class {i}" for i in range(100)],
        "coarse_label_names": [f"group {i}" for i in range(20)],
    }
    return {f"cifar-100-python/{k}": python2(v) for k, v in files.items()}


def cifar_tar_source(name, arrays, folder):
    path = folder / "cifar-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, content in reversed(cifar_files(name, arrays).items()):
            add(tar, file, content)
    return path


def folder_source(files, folder):
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def cifar_folder_source(name, arrays, folder):
    return folder_source(cifar_files(name, arrays), folder) / "cifar-10-batches-py"


def tiny_files(arrays):
    """The files of the official layout.

    `arrays` changes in place to what a reader must get back: the pixels of the decoded JPEGs, in
    the order of the sorted file names.
    """
    files, annotations = {}, ""
    order = np.argsort(arrays["y_train"], kind="stable")
    arrays["x_train"], arrays["y_train"] = arrays["x_train"][order], arrays["y_train"][order]
    for split in ("train", "test"):
        for i, (x, y) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
            content = jpeg(x, mode="L" if i == 1 else None)  # some are grey
            x[...] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            if split == "train":
                files[f"tiny-imagenet-200/train/{WNIDS[y]}/images/{WNIDS[y]}_{i:03d}.JPEG"] = (
                    content
                )
            else:
                files[f"tiny-imagenet-200/val/images/val_{i}.JPEG"] = content
                annotations += f"val_{i}.JPEG\t{WNIDS[y]}\t0\t0\t62\t62\n"
    meta = {"wnids.txt": "\n".join(reversed(WNIDS)), "val/val_annotations.txt": annotations}
    return files | {f"tiny-imagenet-200/{k}": v.encode() for k, v in meta.items()}


def tiny_folder_source(name, arrays, folder):
    return folder_source(tiny_files(arrays), folder)


def tiny_zip_source(name, arrays, folder):
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in tiny_files(arrays).items():
            archive.writestr(file, content)
    return path


def pixels(name, images):
    """Normalised images as pixels 0..255."""
    spec = SPECS[name]
    fractions = np.asarray(images) * np.array(spec.std) + np.array(spec.mean)
    return np.round(fractions * 255).astype(int)
