"""Tables of several training seeds in Markdown: figures, and paired differences over prompts with their 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.metrics.intervals import bootstrap

Claim = tuple[str, str, str, str]
"""A sentence, a figure, and the points a and b, `model|k`, whose difference a − b it is about."""


def load(path: Path) -> dict[str, Any]:
    """The results of one seed."""
    return json.loads(path.read_text("utf-8"))


def difference(run: Mapping[str, Any], axis: str, a: str, b: str) -> str:
    """Mean of a − b over prompts, with its interval."""
    values = torch.tensor(run["per_prompt"][a][axis]) - torch.tensor(run["per_prompt"][b][axis])
    low, high = bootstrap(lambda rows: values[rows].mean(), len(values))
    return f"{float(values.mean()):+.2f} ({float(low):+.2f} … {float(high):+.2f})"


def claims(runs: Sequence[Mapping[str, Any]], tests: Sequence[Claim]) -> str:
    """Every claim whose points all runs have, one column per seed."""
    out = header(["claim", *(f"seed {run['seed']}" for run in runs)])
    for claim, axis, a, b in tests:
        if all(key in run["per_prompt"] for run in runs for key in (a, b)):
            out.append(row([claim, *(difference(run, axis, a, b) for run in runs)]))
    return "\n".join(out)


def header(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(names), "|" + "---|" * len(names)]


def row(cells: Sequence[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def per_prompt(judged: Mapping[tuple[str, int], Any]) -> dict[str, dict[str, list[float]]]:
    """Figures per prompt by `model|k`."""
    return {f"{m}|{k}": {name: v.tolist() for name, v in j.per_prompt().items()} for (m, k), j in judged.items()}
