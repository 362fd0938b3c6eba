"""The learning rates and the tables of `python -m trainer compare` in docs/results.md.

python -m tools.embedded.methods grid FOLDER                    # learning rates, on a seed and prompts of their own
python -m tools.embedded.methods table DIR0 DIR1 DIR2 OUT.md    # finished seeds side by side
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.demo import experiment, page, world
from trainer.demo.compare import METHODS, Size, rewards, train_config
from trainer.demo.experiment import UNGUIDED
from trainer.runtime.files import write_text

from . import tables
from .tables import Claim

log = logging.getLogger(__name__)

GRID_SEED = 9
GRID = Size(points=14)  # more evaluations: a rate is chosen by their mean
RATES = (1e-3, 2e-3, 4e-3)
AXES = (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("relative", "s⁺ − s⁻"))
CLAIMS: tuple[Claim, ...] = (
    ("SQDF against DRaFT-LV, alone: diversity", "diversity", "sqdf|0", "draft-lv|0"),
    ("… proxy", "reward", "sqdf|0", "draft-lv|0"),
    ("… held-out", "heldout", "sqdf|0", "draft-lv|0"),
    ("SQDF against DRaFT-8, alone: diversity", "diversity", "sqdf|0", "draft-k|0"),
    ("… proxy", "reward", "sqdf|0", "draft-k|0"),
    ("SRPO against ReFL, alone: gold", "gold", "srpo|0", "refl|0"),
    ("… proxy", "reward", "srpo|0", "refl|0"),
    ("SRPO against Direct-Align, alone: gold", "gold", "srpo|0", "direct-align|0"),
    ("… proxy", "reward", "srpo|0", "direct-align|0"),
)


def grid(folder: Path, names: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Every method at every rate, on a seed of its own; a method takes the rate with the best `grid_score`.

    Where the highest rate is the best, the double is tried too, until it is not.
    """
    samples, judges = experiment.renders(size.real, GRID_SEED), rewards()
    watched = [c.text for c in world.captions(size.watched, "validation grid")]
    rows: list[dict[str, Any]] = []
    for name in names:
        tried: list[tuple[float, float]] = []
        rates = list(RATES)
        while rates:
            rate = rates.pop(0)
            config = train_config(name, folder / f"{name}-{rate:g}", size, GRID_SEED, rate)
            points = experiment.train(config, samples, watched, judges)
            rows.append({"method": name, "lr": rate, "score": grid_score(points), "points": points})
            log.info("%s at %g: %.3f", name, rate, rows[-1]["score"])
            tried.append((rows[-1]["score"], rate))
            if not rates and max(tried)[1] == rate:
                rates = [2 * rate]
    return rows


def grid_score(points: Sequence[Mapping[str, float]]) -> float:
    """Mean held-out reward over the second half of a run's evaluations: one point is too noisy to choose by."""
    half = points[len(points) // 2 :]
    return sum(p["heldout"] for p in half) / len(half)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Gains over the guided base, each cell one figure per seed."""
    seeds = ", ".join(str(run["seed"]) for run in runs)
    out = [f"Training seeds {seeds}; {runs[0]['n']} test images; gains over the guided base. `best` is the best held-out checkpoint.", ""]
    out += tables.header(["model", "k", *(label for _, label in AXES), "diversity of base", "FID"])
    for model, k in [UNGUIDED, *((p["model"], p["k"]) for p in runs[0]["points"])]:
        points = [_point(run, model, k) for run in runs]
        gains = [" / ".join(f"{p[a] - run['base'][a]:+.2f}" for p, run in zip(points, runs)) for a, _ in AXES]
        share = " / ".join(f"{100 * p['diversity'] / run['base']['diversity']:.0f} %" for p, run in zip(points, runs))
        out.append(tables.row([page.title(model), k, *gains, share, " / ".join(f"{p['fid']:.0f}" for p in points)]))
    return "\n".join(out)


def own_objectives(runs: Sequence[Mapping[str, Any]]) -> str:
    """Each method's gain in what it optimises, tuned model alone against the base it was trained from, with its interval."""
    out = tables.header(["method", "optimises", *(f"seed {run['seed']}" for run in runs)])
    for name in runs[0]["curves"]:
        axis = "relative" if name == "srpo" else "reward"
        cells = [tables.difference(run, axis, f"{name}|0", "|".join(map(str, UNGUIDED))) for run in runs]
        out.append(tables.row([page.title(name), dict(AXES)[axis], *cells]))
    return "\n".join(out)


def mean_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several seeds averaged, as far as the frontier needs them."""

    def mean(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {k: sum(p[k] for p in points) / len(points) for k, v in points[0].items() if isinstance(v, float)}

    keys = [(p["model"], p["k"]) for p in runs[0]["points"]]
    points = [{"model": m, "k": k, **mean([_point(run, m, k) for run in runs])} for m, k in keys]
    return {**{name: mean([run[name] for run in runs]) for name in ("base", UNGUIDED[0])}, "points": points, "curves": runs[0]["curves"]}


def _point(run: Mapping[str, Any], model: str, k: int) -> dict[str, float]:
    return run[model] if model in run else next(p for p in run["points"] if p["model"] == model and p["k"] == k)


def main() -> None:
    """The grid, or the tables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="The learning rates and the tables of the comparison of all methods")
    commands = parser.add_subparsers(dest="command", required=True)
    rates = commands.add_parser("grid", help="every method at several learning rates")
    rates.add_argument("folder", type=Path)
    rates.add_argument("methods", nargs="*", default=list(METHODS))
    finished = commands.add_parser("table", help="write the tables of finished seeds")
    finished.add_argument("folders", type=Path, nargs="+")
    finished.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        runs = [tables.load(folder / "results.json") for folder in a.folders]
        parts = ["### What each method optimises", own_objectives(runs), "### The claims", tables.claims(runs, CLAIMS)]
        write_text("\n\n".join([table(runs), *parts]) + "\n", a.out)
        page.frontier_figure(mean_of(runs)).savefig(a.out.with_suffix(".png"), dpi=90)
        return
    torch.set_num_threads(1)
    a.folder.mkdir(parents=True, exist_ok=True)
    result = {"seed": GRID_SEED, "budget": GRID.budget, "rows": grid(a.folder, a.methods, GRID)}
    write_text(json.dumps(result, indent=1) + "\n", a.folder / f"grid-{'-'.join(a.methods)[:80]}.json")


if __name__ == "__main__":
    main()
