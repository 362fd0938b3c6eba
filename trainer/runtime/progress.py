"""A progress bar for what may take long before a run's first step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def slow(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a bar on the first process's terminal where they take more than a few seconds."""
    if os.environ.get("RANK", "0") != "0":
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=3, leave=False)
