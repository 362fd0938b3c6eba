"""A reward's mean and standard deviation over images, in one pass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from ..runtime.files import write_text


def measure(scores: Iterable[float]) -> tuple[float, float, int]:
    """Scores -> mean, standard deviation, number (Welford 1962). Raises ValueError unless at least two scores differ."""
    number, mean, squares = 0, 0.0, 0.0
    for score in scores:
        number += 1
        change = score - mean
        mean += change / number
        squares += change * (score - mean)
    if number < 2 or squares == 0:
        raise ValueError(f"{number} images with {'equal scores' if number > 1 else 'a score'}: give at least two whose scores differ")
    return mean, math.sqrt(squares / (number - 1)), number


class StatisticsError(ValueError):
    """What is wrong with a mean and a standard deviation."""


def checked_statistics(values: Any) -> tuple[float, float]:
    """The mean and the standard deviation in a JSON object; StatisticsError names the key that is missing or out of range."""
    if not isinstance(values, dict):
        raise StatisticsError("it is not a JSON object")
    found: list[float] = []
    for key in ("mean", "std"):
        value = cast(dict[str, Any], values).get(key)
        if value is None:
            raise StatisticsError(f"it has no {key}")
        try:
            found.append(float(value))
        except (ValueError, TypeError, OverflowError) as error:
            raise StatisticsError(f"{key} is not a number") from error
        if not math.isfinite(found[-1]) or (key == "std" and found[-1] <= 0):
            raise StatisticsError(f"{key} is {found[-1]:g}")
    return found[0], found[1]


def write(path: Path, mean: float, std: float, number: int) -> None:
    """Write the file that `registry.WeightFolders.read_statistics` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({"mean": mean, "std": std, "images": number}, indent=1) + "\n", path)
