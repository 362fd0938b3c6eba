"""What a file is, whatever its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """sha256 of a module's weights and their names, in hexadecimal: the same from a folder as from a single file."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
