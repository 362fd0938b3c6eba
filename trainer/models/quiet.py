"""Warnings of libraries that ask nothing of a user."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without_dtype_warning() -> Generator[None]:
    """Silence diffusers' `torch_dtype` deprecation warning: older versions do not know the new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        yield
