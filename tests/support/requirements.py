"""What a test needs of the machine: without it the test is skipped, or fails where CI says so."""

import os

import pytest


def needs(reason: str | None) -> pytest.MarkDecorator:
    """Skips a test where something is missing; with BLOCKSPARSE_JAX_NO_SKIP=1 that is an error."""
    if reason and os.environ.get("BLOCKSPARSE_JAX_NO_SKIP") == "1":
        raise RuntimeError(f"BLOCKSPARSE_JAX_NO_SKIP=1, and a test cannot run: {reason}")
    return pytest.mark.skipif(bool(reason), reason=str(reason))
