"""Compiles the handler of cusparselt.cc: where the headers are, the command, the library that it
makes.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("cusparselt.cc")
LIBRARY = Path(__file__).with_name("libtwo_of_four.so")


def nvidia_folders() -> list[Path]:
    """Where the wheels of NVIDIA put their headers and libraries.

    Returns:
      Folders that have an `include` or a `lib`.

    Example:
      >>> all(folder.is_dir() for folder in nvidia_folders())
      True
    """
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [
        folder
        for place in places
        for folder in sorted(place.iterdir())
        if folder.is_dir() and {"include", "lib"} & set(os.listdir(folder))
    ]


def headers(folders: Iterable[Path] = ()) -> list[Path] | str:
    """The folders of the headers, or what is missing.

    Args:
      folders: to look into before NVIDIA's wheels and the installed toolkit.

    Returns:
      Folders for the compiler, or a reason.

    Example:
      >>> isinstance(headers(), (list, str))
      True
    """
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if compiler := shutil.which("nvcc"):
        toolkits.append(str(Path(compiler).resolve().parents[1]))
    toolkits.append("/usr/local/cuda")
    places = [
        *map(Path, folders),
        *(folder / "include" for folder in nvidia_folders()),
        *(Path(kit) / "include" for kit in toolkits),
    ]
    found = []
    for name, package in (
        ("cusparseLt.h", "nvidia-cusparselt-cu13"),
        ("driver_types.h", "nvidia-cuda-runtime"),
    ):
        place = next((place for place in places if (place / name).is_file()), None)
        if place is None:
            return f"{name} is not here; pip install {package}, or name its folder with --include"
        found.append(place)
    return list(dict.fromkeys(found))


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, else the first of c++, g++, clang++.

    Returns:
      Its name, or None.
    """
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def missing(folders: Iterable[Path] = ()) -> str | None:
    """Why the handler cannot be built here: None where it can.

    Args:
      folders: as in `headers`.

    Returns:
      None, or the reason.
    """
    found = headers(folders)
    if isinstance(found, str):
        return found
    return (
        None
        if compiler()
        else "no C++ compiler is here (c++, g++ or clang++, or the one that $CXX names)"
    )


def command(source: Path, out: Path, folders: Iterable[Path] = ()) -> list[str]:
    """The command that compiles.

    Args:
      source: a C++ file.
      out: the library.
      folders: as in `headers`.

    Returns:
      Words of the command.

    Raises:
      RuntimeError: something is missing; the message says what.
    """
    folders = list(folders)
    if reason := missing(folders):
        raise RuntimeError(reason)
    includes = [
        word
        for folder in (Path(jax.ffi.include_dir()), *headers(folders))
        for word in ("-isystem", str(folder))
    ]
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-fvisibility-inlines-hidden",
    ]
    return [str(compiler()), *flags, *includes, str(source), "-o", str(out), "-ldl"]


def build(out: Path = LIBRARY, folders: Iterable[Path] = ()) -> Path:
    """Compiles the handler.

    Args:
      out: the library.
      folders: as in `headers`.

    Returns:
      `out`.

    Raises:
      RuntimeError: something is missing, or the compiler's error.
    """
    result = subprocess.run(command(SOURCE, out, folders), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-4000:])
    return out
