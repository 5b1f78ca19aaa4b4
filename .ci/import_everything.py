"""Imports every module of the installed library, where only its core dependencies are installed.

Modules of a backend whose packages are missing may fail, by the name of that package only.
"""

import importlib
import pkgutil

BACKENDS = {"triton": {"triton", "jax_triton"}}  # a folder's name -> the packages that it needs
NATIVE = "pallas_kernels.libblock_sparse_conv"  # machine code, no Python module

failed, imported = [], 0
for package in ("blocksparse_jax", "pallas_kernels"):
    root = importlib.import_module(package)
    assert "site-packages" in root.__file__, f"{root.__file__} is not the installed wheel"
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        if module.name == NATIVE:
            continue
        try:
            importlib.import_module(module.name)
            imported += 1
        except ImportError as error:
            optional = {name for part in module.name.split(".") for name in BACKENDS.get(part, ())}
            if (error.name or "").partition(".")[0] not in optional:
                failed.append(f"{module.name}: {error}")
assert not failed, "\n".join(failed)
assert imported > 50, imported
print(f"imported {imported} modules with the core dependencies")
