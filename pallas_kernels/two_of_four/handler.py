"""Compiles the handler of cusparselt.cc: finds the headers and the compiler, and runs it."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("cusparselt.cc")
LIBRARY = Path(__file__).with_name("libtwo_of_four.so")
HEADERS = {
    "cusparseLt.h": "nvidia-cusparselt-cu13",
    "driver_types.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
}
"""The headers that the compiler needs, and the packages that bring them."""


def nvidia_folders() -> list[Path]:
    """Where the wheels of NVIDIA put their headers and libraries.

    Returns:
      Folders that have an `include` or a `lib`.

    Example:
      >>> all(folder.is_dir() for folder in nvidia_folders())
      True
    """
    spec = importlib.util.find_spec("nvidia")
    if spec is None:
        return []
    return [
        folder
        for packages in map(Path, spec.submodule_search_locations or [])
        for folder in sorted(packages.iterdir())
        if folder.is_dir() and {"include", "lib"} & set(os.listdir(folder))
    ]


def headers(folders: Iterable[Path] = ()) -> list[Path] | str:
    """The folders of the headers, or what is missing.

    Args:
      folders: searched before NVIDIA's wheels and the installed toolkit.

    Returns:
      Folders for the compiler, or a reason.

    Example:
      >>> isinstance(headers(), (list, str))
      True
    """
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(str(Path(nvcc).resolve().parents[1]))
    toolkits.append("/usr/local/cuda")
    candidates = [
        *map(Path, folders),
        *(folder / "include" for folder in nvidia_folders()),
        *(Path(toolkit) / "include" for toolkit in toolkits),
    ]
    with_headers = []
    for header, package in HEADERS.items():
        having = [folder for folder in candidates if (folder / header).is_file()]
        if not having:
            return f"{header} is not here; pip install {package}, or name its folder with --include"
        with_headers.append(having[0])
    return list(dict.fromkeys(with_headers))


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, else the first of c++, g++, clang++.

    Returns:
      Its name, or None.
    """
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def missing(folders: Iterable[Path] = ()) -> str | None:
    """Why the handler cannot be built here.

    Args:
      folders: as in `headers`.

    Returns:
      None where it can, else the reason.
    """
    include = headers(folders)
    if isinstance(include, str):
        return include
    if compiler() is None:
        return "no C++ compiler is here (c++, g++ or clang++, or the one that $CXX names)"
    return None


def command(source: Path, out: Path, folders: Iterable[Path] = ()) -> list[str]:
    """The command that compiles.

    Args:
      source: a C++ file.
      out: the library.
      folders: as in `headers`.

    Returns:
      The words of the command.

    Raises:
      RuntimeError: something is missing; the message says what.
    """
    folders = list(folders)
    if reason := missing(folders):
        raise RuntimeError(reason)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra"]
    flags += ["-shared", "-fPIC", "-fvisibility-inlines-hidden"]
    includes = []
    for folder in (jax.ffi.include_dir(), *headers(folders)):
        includes += ["-isystem", str(folder)]
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
