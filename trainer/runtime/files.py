"""Files written whole or not at all, and SHA-256 of files and of module weights."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger(__name__)


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


def named(path: Path) -> str:
    """A path as messages name it: the current folder by its own name."""
    return str(path if path.name else path.resolve())


def quoted(path: Path) -> str:
    """A path as part of a command: in double quotes, which every shell reads, where it holds a blank."""
    return f'"{path}"' if any(letter.isspace() for letter in str(path)) else str(path)


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which `folder` lies or would lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; an unchanged file is read once per process."""
    state = path.stat()
    return _hash(path.absolute(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of one file, of several files' hashes in their order, or "" of none."""
    if len(paths) < 2:
        return file_hash(paths[0]) if paths else ""
    return hashlib.sha256("".join(file_hash(path) for path in paths).encode()).hexdigest()


@lru_cache(maxsize=64)
def _warn_once(where: Path) -> None:
    log.warning("%s records no hash of its weights, as files of 0.2.0 and earlier: they are taken to be the same", where)


def check_weights(where: Path, then: Mapping[str, str] | None, now: Mapping[str, str], remedy: str) -> None:
    """ValueError where the weights that a file was made with are others now; then, now: SHA-256 by name.

    Without a record (None; version 0.2.0 wrote none) a warning.
    """
    if then is None:
        if now:
            _warn_once(where)
        return
    for name, present in now.items():
        if then.get(name, present) != present:
            raise ValueError(f"{where} was made with other weights of {name}: sha256 {then[name][:12]}, now {present[:12]}; {remedy}")


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and their names, in hexadecimal; equal for a folder and a single file of the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
