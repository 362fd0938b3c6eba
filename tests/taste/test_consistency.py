"""What of a person's choices no head could learn."""

from __future__ import annotations

import pytest
from helpers.taste import compare

from trainer.taste.comparisons import Gathered
from trainer.taste.consistency import consistency


def test_contradictions_cycles_and_a_liking_for_one_side_are_counted():
    found = Gathered(
        [
            *(compare(a, b) for a, b in ("ab", "ba", "ab", "cd")),  # a over b twice, b over a once
            *(compare(a, b, "q") for a, b in ("xy", "yz", "zx", "xw")),  # a circle of three, and one choice outside
            compare("x", "y", "r"),
            compare("z", "x", "r", tie=True),
        ],
        places=[(0, 2, "")] * 19 + [(1, 2, "")],
    )
    seen = consistency(found)
    assert (seen.repeated, seen.same, seen.cycles) == (1, pytest.approx(2 / 3), 3)
    assert seen.first.value == 0.95 and seen.first.low > 0.7
    said = "\n".join(seen.warnings)
    assert "same answer in 67% only" in said and "3 choices run in circles" in said and "shown first was chosen in 0.95" in said
