"""The files of choices in ComfyUI's user folder. It knows no node."""

from __future__ import annotations

from pathlib import Path

from ..trainer.data.choices import is_choices
from ..trainer.taste.choices import NAME
from ..trainer.taste.questions import FOLDER
from . import host

DEFAULT_USER = "default"  # of a ComfyUI without --multi-user


def sets() -> dict[str, Path]:
    """The files of choices, `taste: NAME` each. None where ComfyUI has several users: a list of choices knows no user."""
    home = host.user_folder(DEFAULT_USER) / FOLDER
    if host.has_users() or home.is_symlink() or not home.is_dir():
        return {}
    found = {folder.name: folder / NAME for folder in sorted(home.iterdir()) if not folder.is_symlink()}
    return {f"taste: {name}": path for name, path in found.items() if not path.is_symlink() and is_choices(path)}
