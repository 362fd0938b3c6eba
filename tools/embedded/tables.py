"""Finished seeds side by side, in Markdown and figures: python -m tools.embedded.tables DIR0 DIR1 DIR2 OUT.md

A folder is one of `python -m trainer compare` or of `tools.embedded.results seed`. Figures go to OUT-frontier.png and OUT-curves.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.demo import charts
from trainer.demo.compare import METHODS
from trainer.demo.experiment import START, UNGUIDED
from trainer.metrics.intervals import bootstrap
from trainer.runtime.files import write_text

AXES = (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("relative", "s⁺ − s⁻"))
BASELINE = "|".join(map(str, UNGUIDED))
CLAIMS = (
    ("ReFL against the base: held-out", "heldout", "refl|0", "base|0"),
    ("… gold", "gold", "refl|0", "base|0"),
    ("ReFL against the unguided base: diversity", "diversity", "refl|0", BASELINE),
    ("ReFL combined against alone: diversity", "diversity", f"refl|{START}", "refl|0"),
    ("… held-out", "heldout", f"refl|{START}", "refl|0"),
    ("ImageReFL against ReFL, both combined: held-out", "heldout", f"imagerefl|{START}", f"refl|{START}"),
    ("… diversity", "diversity", f"imagerefl|{START}", f"refl|{START}"),
    ("SQDF against DRaFT-LV, alone: diversity", "diversity", "sqdf|0", "draft-lv|0"),
    ("… proxy", "reward", "sqdf|0", "draft-lv|0"),
    ("… held-out", "heldout", "sqdf|0", "draft-lv|0"),
    ("SQDF against DRaFT-8, alone: diversity", "diversity", "sqdf|0", "draft-k|0"),
    ("… proxy", "reward", "sqdf|0", "draft-k|0"),
    ("SRPO against ReFL, alone: gold", "gold", "srpo|0", "refl|0"),
    ("… proxy", "reward", "srpo|0", "refl|0"),
    ("SRPO with words that know the bias, against ReFL: gold", "gold", "srpo-bias|0", "refl|0"),
    ("… proxy", "reward", "srpo-bias|0", "refl|0"),
    ("SRPO against Direct-Align, alone: gold", "gold", "srpo|0", "direct-align|0"),
    ("… proxy", "reward", "srpo|0", "direct-align|0"),
)
SURROGATES = ("flowbp-sparse", "flowbp-bridge", "flowbp-lagrange", "leapalign")
CLAIMS += tuple(
    (f"{charts.title(name)} against {charts.title(other)}, {how}: {label}", axis, f"{name}|{k}", f"{other}|{k}")
    for name in SURROGATES
    for other, how, k in (("refl", "alone", 0), ("imagerefl", "combined", START))
    for axis, label in (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("diversity", "diversity"))
)
"""A claim, a figure, and the points a and b, `model|k`, whose difference a − b it is about."""

Runs = Sequence[Mapping[str, Any]]


def gains(runs: Runs) -> str:
    """Gains over the guided base, each cell one figure per seed."""
    axes = [(name, label) for name, label in AXES if name in runs[0]["base"]]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    out = [f"Training seeds {seeds}; {runs[0]['n']} test images; gains over the guided base. `best` is the best held-out checkpoint.", ""]
    out += _header("model", "k", *(label for _, label in axes), "diversity of base", "FID")
    for model, k in [UNGUIDED, *((p["model"], p["k"]) for p in runs[0]["points"])]:
        points = [_point(run, model, k) for run in runs]
        cells = [" / ".join(f"{p[a] - run['base'][a]:+.2f}" for p, run in zip(points, runs)) for a, _ in axes]
        share = " / ".join(f"{100 * p['diversity'] / run['base']['diversity']:.0f} %" for p, run in zip(points, runs))
        out.append(_row(charts.title(model), k, *cells, share, " / ".join(f"{p['fid']:.0f}" for p in points)))
    return "\n".join(out)


def own_objectives(runs: Runs) -> str:
    """Each method's gain in what it optimises, tuned model alone against the base it was trained from, with its interval."""
    out = _header("method", "optimises", *(f"seed {run['seed']}" for run in runs))
    for name in runs[0]["curves"]:
        if name in METHODS and METHODS[name].objective.get("name", name) != name:
            continue  # what it optimises is not measured
        axis = "relative" if name == "srpo" else "reward"
        out.append(_row(charts.title(name), dict(AXES)[axis], *(_difference(run, axis, f"{name}|0", BASELINE) for run in runs)))
    return "\n".join(out)


def claims(runs: Runs) -> str:
    """Paired differences over prompts, with 95 % intervals; claims about methods that a run does not have are left out."""
    out = _header("claim", *(f"seed {run['seed']}" for run in runs))
    for claim, axis, a, b in CLAIMS:
        if all(key in run["per_prompt"] for run in runs for key in (a, b)):
            out.append(_row(claim, *(_difference(run, axis, a, b) for run in runs)))
    return "\n".join(out)


def mean_of(runs: Runs) -> dict[str, Any]:
    """The figures of several seeds averaged, as far as figures need them."""

    def mean(points: Runs) -> dict[str, float]:
        return {k: sum(p[k] for p in points) / len(points) for k, v in points[0].items() if isinstance(v, float)}

    points = [{**p, **mean([_point(run, p["model"], p["k"]) for run in runs])} for p in runs[0]["points"]]
    curves = {name: [mean(at) for at in zip(*(run["curves"][name] for run in runs))] for name in runs[0]["curves"]}
    return {**{name: mean([run[name] for run in runs]) for name in ("base", UNGUIDED[0])}, "points": points, "curves": curves}


def _point(run: Mapping[str, Any], model: str, k: int) -> dict[str, float]:
    return run[model] if model in run else next(p for p in run["points"] if p["model"] == model and p["k"] == k)


def _difference(run: Mapping[str, Any], axis: str, a: str, b: str) -> str:
    values = torch.tensor(run["per_prompt"][a][axis]) - torch.tensor(run["per_prompt"][b][axis])
    low, high = bootstrap(lambda rows: values[rows].mean(), len(values))
    return f"{float(values.mean()):+.2f} ({float(low):+.2f} … {float(high):+.2f})"


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write(folders: Sequence[Path], out: Path) -> None:
    """The tables of finished seeds, and their figures beside them."""
    runs = [json.loads((folder / "results.json").read_text("utf-8")) for folder in folders]
    parts = [gains(runs), "### What each method optimises", own_objectives(runs), "### The claims", claims(runs)]
    write_text("\n\n".join(parts) + "\n", out)
    mean = mean_of(runs)
    charts.frontier_figure(mean).savefig(out.with_name(f"{out.stem}-frontier.png"), dpi=90)
    charts.curves_figure(mean["curves"]).savefig(out.with_name(f"{out.stem}-curves.png"), dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tables of docs/results.md")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.folders, arguments.out)
