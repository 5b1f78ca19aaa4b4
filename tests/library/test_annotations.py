"""Signatures are right: jaxtyping and beartype check each argument and result while the examples
of all docstrings run.
"""

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

PACKAGE = "blocksparse_jax"
# An int serves where a float is expected.
_checks = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """The type checker for the import hook. It skips the fields of pytree dataclasses, which JAX
    rebuilds with placeholders.
    """
    return function if function.__name__ == "__init__" else _checks(function)


@pytest.mark.slow
def test_the_examples_run_with_checked_signatures():
    """In a new process, since the hook must be installed before the library is imported."""
    cached = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | cached
    )
    assert done.returncode == 0, done.stdout + done.stderr
    examples = int(done.stdout.split()[-1])
    assert examples > 100, "most examples did not run"


def run_examples():
    """Runs the examples of every function and class of the library; returns (failed, attempted)."""
    jaxtyping.install_import_hook(PACKAGE, "test_annotations.checked")
    bsj = importlib.import_module(PACKAGE)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    for info in pkgutil.walk_packages(bsj.__path__, f"{PACKAGE}."):
        module = importlib.import_module(info.name)
        # `doctest.testmod` would find nothing: the hook's wrappers hide their module from it.
        for name, value in sorted(vars(module).items()):
            if callable(value) and getattr(value, "__module__", None) == info.name:
                for test in finder.find(
                    value, f"{info.name}.{name}", module=False, globs=dict(vars(module))
                ):
                    runner.run(test)
    try:
        bsj.unpack(
            jnp.ones((3, 3)),
            bsj.random_groups(jax.random.key(0), (3, 3, 4, 4), group_size=4, kept=2, kept_taps=3),
        )
    except jaxtyping.TypeCheckError:
        return runner.summarize(verbose=False)
    raise AssertionError("packed values of rank 2 passed: nothing was checked")


if __name__ == "__main__":
    failed, attempted = run_examples()
    print(attempted)
    sys.exit(failed > 0)
