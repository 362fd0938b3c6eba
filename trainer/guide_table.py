"""Tables of coefficients over noise levels: `σ: c1, c2; …`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .guidance import MARGIN

Row = tuple[float, tuple[float, ...]]
"""A noise level and the coefficients there."""


def parse_table(text: str) -> list[Row]:
    """`14.6: 1,0; 0.6: 0.5,0.5` as rows of falling σ; raises ValueError with the row that is wrong."""
    rows: list[Row] = []
    for part in text.replace("\n", ";").split(";"):
        if not part.strip():
            continue
        level, _, values = part.partition(":")
        try:
            row = (float(level), tuple(float(value) for value in values.split(",")))
        except ValueError:
            raise ValueError(f"coefficients {part.strip()!r}: write `σ: c1, c2`, as in 14.6: 1, 0; 0.6: 0.5, 0.5") from None
        if not all(map(math.isfinite, (row[0], *row[1]))) or row[0] < 0:
            raise ValueError(f"coefficients {part.strip()!r}: give finite numbers, and a σ of 0 or more")
        if len(row[1]) not in (2, 4, 6):
            raise ValueError(f"coefficients {part.strip()!r}: give 2 (base, tuned), 4 (each on prompt, negative) or 6 (and proxy) of them")
        if abs(sum(row[1]) - 1) > 1e-6:
            raise ValueError(f"coefficients {part.strip()!r} sum to {sum(row[1]):g}: they must sum to 1")
        if rows and (row[0] >= rows[-1][0] or len(row[1]) != len(rows[0][1])):
            raise ValueError(f"coefficients {part.strip()!r}: give rows of one length, with σ below the row before")
        rows.append(row)
    if not rows:
        raise ValueError("no coefficients: write rows `σ: c1, c2`, as in 14.6: 1, 0; 0.6: 0.5, 0.5")
    return rows


def row_at(rows: Sequence[Row], sigma: float, linear: bool) -> tuple[float, ...]:
    """The coefficients at σ; those that are equal in both neighbours stay exact, so that a 0 costs no call."""
    above = max(0, sum(sigma <= level * MARGIN for level, _ in rows) - 1)
    (high, before), (low, after) = rows[above], rows[min(above + 1, len(rows) - 1)]
    if not linear or sigma >= high or high == low:
        return before
    share = (high - sigma) / (high - low)
    return tuple(a if a == b else a + share * (b - a) for a, b in zip(before, after))
