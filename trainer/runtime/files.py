"""Files written whole or not at all, and SHA-256 of files and of module weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A path to write beside `path`, forced to the disk and renamed at the end: a kill at any moment leaves the old file or the new.

    Raises OSError, with `path` in its message, where writing fails; the old file is then intact.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's archive turns a full disk into a RuntimeError
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """A UTF-8 text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and their names, in hexadecimal; equal for a folder and a single file of the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
