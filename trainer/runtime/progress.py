"""Progress bars before a run's first step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, behind a bar in the main process that appears after three seconds."""
    if os.environ.get("RANK", "0") != "0":
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description, delay=3, leave=False)
