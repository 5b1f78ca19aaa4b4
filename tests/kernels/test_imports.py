"""The library and its kernels import with nothing but the core dependencies installed."""

import tomllib
from pathlib import Path

from new_process import run_python

ROOT = Path(__file__).resolve().parents[2]
# Flax itself depends on rich and importlib-resources.
OF_FLAX = {"importlib_resources", "rich"}
NAMES = {
    "array_record": "array_record",
    "bitarray": "bitarray",
    "grain": "grain",
    "matplotlib": "matplotlib",
    "opencv_python_headless": "cv2",
    "pillow": "PIL",
    "scikit_learn": "sklearn",
    "tensorboardx": "tensorboardX",
    "tensorflow_datasets": "tensorflow_datasets",
    "tyro": "tyro",
    "jax_triton": "jax_triton",
}
"""The modules of the packages that only extras bring."""
IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    names = set(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is no core dependency")

sys.meta_path.insert(0, Blocked())
count = 0
for package in ("blocksparse_jax", "pallas_kernels"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, f"{package}."):
        if not info.name.split(".")[-1].startswith("lib"):
            importlib.import_module(info.name)
            count += 1
print(count)
"""


def extras():
    """The packages that users and kernels may need beyond the core dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for requirement in (*optional["experiments"], *optional["gpu"]):
        name = requirement.split(">")[0].split("[")[0].replace("-", "_")
        if name not in OF_FLAX | {"jax"}:
            yield NAMES[name]


def test_every_module_imports_without_the_extras():
    blocked = {*extras(), "triton", "experiments", "tests"}
    assert len(blocked) > 10
    done = run_python("-c", IMPORT_ALL, ",".join(blocked))
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60


def test_an_import_leaves_the_devices_alone():
    """`jax.distributed.initialize`, flags and the allocator of a benchmark come after imports."""
    code = """
import importlib, pkgutil
from jax._src import xla_bridge
for package in ("blocksparse_jax", "pallas_kernels"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, f"{package}."):
        if not info.name.split(".")[-1].startswith("lib"):
            importlib.import_module(info.name)
            assert not xla_bridge.backends_are_initialized(), info.name
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
