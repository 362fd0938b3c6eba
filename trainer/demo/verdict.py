"""The claim in words: what one run shows, and what the experiment over five training seeds says (docs/results.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics.frontier import SHARE, Curves, Interval

CO_PRIMARY = {"heldout": "held-out", "gold": "gold"}
SEEDS = 5
NO_DIFFERENCE = 0.1
FILE = Path(__file__).with_name("verdict.json")
"""Written by tools/embedded/verdict.py."""


def direction(leads: Sequence[Interval]) -> str:
    """`true` where every interval is above 0, `false` where all are below, `no difference` where all are within ±0.1, else `undecided`."""
    if all(low > 0 for _, low, _ in leads):
        return "true"
    if all(high < 0 for _, _, high in leads):
        return "false"
    return "no difference" if all(low > -NO_DIFFERENCE and high < NO_DIFFERENCE for _, low, high in leads) else "undecided"


def decide(leads: Mapping[str, Sequence[Interval]]) -> str:
    """The verdict from the co-primary leads of all training seeds."""
    seeds = len(leads["heldout"])
    return direction([lead for axis in CO_PRIMARY for lead in leads[axis]]) if seeds >= SEEDS else f"undecided (n = {seeds})"


def of_run(per_prompt: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Gains of both methods at 85 % of the base's diversity in one run, ImageReFL's leads with intervals, and what they say."""
    curves = Curves(per_prompt)
    gains = {m: {axis: curves.gain([m], axis, SHARE, curves.all) for axis in CO_PRIMARY} for m in ("refl", "imagerefl")}
    leads = {axis: curves.lead(["imagerefl"], ["refl"], axis) for axis in CO_PRIMARY}
    return {"share": SHARE, "gains": gains, "leads": leads, "direction": direction(list(leads.values()))}


def run_sentence(claim: Mapping[str, Any]) -> str:
    """The result of one run."""
    ours, theirs, leads = claim["gains"]["imagerefl"], claim["gains"]["refl"], claim["leads"]
    parts = [f"in {n} reward {_signed(ours[a])} and {_signed(theirs[a])} ({_compared(leads[a])})" for a, n in CO_PRIMARY.items()]
    return f"With at least {100 * claim['share']:.0f} % of the base model's diversity, ImageReFL and ReFL gain {', '.join(parts)}."


def _compared(lead: Interval) -> str:
    words = {"true": "ImageReFL leads", "false": "ImageReFL trails", "no difference": "no difference", "undecided": "undecided"}
    return f"{words[direction([lead])]}: {_signed(lead[0])} [{_signed(lead[1])}, {_signed(lead[2])}]"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def experiment_sentence(verdict: Mapping[str, Any], run: str, prompts: int) -> str:
    """The experiment's verdict, and that one small run can differ from it where it does."""
    seeds, word = verdict["seeds"], verdict["verdict"]
    if not seeds:
        return f"The experiment over {SEEDS} training seeds has no result yet: {word}. One small run decides nothing."
    leads = "; ".join(f"{label} {', '.join(_signed(lead[0]) for lead in verdict['leads'][axis])}" for axis, label in CO_PRIMARY.items())
    text = f"The experiment over {seeds} training seed{'s' if seeds > 1 else ''}: {word}; leads of ImageReFL, seeds in turn: {leads}."
    if verdict["tie"]:
        text = f"ReFL with the same diffusion loss does as well as ImageReFL. {text}"
    if run == word.partition(" (")[0]:
        return text
    return f"{text} This run alone says: {run}. One small run can differ: it has one training seed and {prompts} prompts."


def load() -> dict[str, Any]:
    """`verdict.json`."""
    return json.loads(FILE.read_text("utf-8"))
