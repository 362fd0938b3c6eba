"""Reward search on the embedded model at equal budgets: what each method gains for its model calls, decodes and reward calls.

    python -m trainer compare-sampling --out FOLDER

Each image is the best of a search of its own, so that diversity is that of images drawn independently. Finished chunks are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..generate import generate
from ..guidance import cfg
from ..metrics.intervals import bootstrap
from ..metrics.study import BASE, Point, Study
from ..models.unet import UNetPolicy
from ..reward import Reward
from ..runtime.files import write_text
from ..search.images import Searcher
from ..search.plan import Counts, cost, fitted, rounds_of
from ..search.settings import METHODS, Search, search_of
from . import experiment, files, sampling_page, world
from .experiment import STEPS

MORE_STEPS, REFERENCE = "more steps", "best-of-n"
FIGURES = ("reward", "heldout", "gold", "diversity", "match")
# TFLOP of one at SD1.5's shapes: UNet at 64×64 with guidance, VAE decoder to 512×512, a ViT-H image tower (HPSv2.1, PickScore). Equal model
# calls hide that a candidate's decode is 1.6 of them there; tests/large/arithmetic.py counts these on the meta device.
TFLOP = {"model": 1.6065, "decodes": 2.5145, "rewards": 0.3346}


@dataclass(frozen=True)
class Size:
    """How much a comparison does."""

    prompts: int = 12
    per_prompt: int = 4
    budgets: tuple[int, ...] = (2, 4, 8, 16)  # model calls, as multiples of the steps of one image
    seeds: tuple[int, ...] = (0, 1, 2)
    chunk: int = 4  # prompts that are drawn, judged and stored at a time


QUICK = Size(prompts=2, per_prompt=2, budgets=(2,), seeds=(0, 1), chunk=2)


def searches(names: Sequence[str], budgets: Sequence[int]) -> dict[Point, Search]:
    """Each method at each budget, as wide as the budget allows."""
    found: dict[Point, Search] = {}
    for name in names:
        for b in budgets:
            fields: dict[str, Any] = {"particles": 2 if name == "dlbs" and b >= 4 else 1}  # with one, dlbs is svdd
            if name == "dsearch":
                fields["oversample"] = min(5, b // 2)  # five at the start do not fit a small budget
            found[name, b] = fitted(search_of(name, fields), STEPS, b * STEPS)
    return found


def costs(planned: Mapping[Point, Search], budgets: Sequence[int]) -> dict[Point, Counts]:
    """What one image of each point takes."""
    found = {BASE: Counts(STEPS, 1, 0), **{(MORE_STEPS, b): Counts(b * STEPS, 1, 0) for b in budgets}}
    return found | {point: cost(search, rounds_of(search, STEPS)) for point, search in planned.items()}


def draw(
    policy: UNetPolicy,
    reward: Reward,
    prompts: Sequence[str],
    first: int,
    planned: Mapping[Point, Search],
    budgets: Sequence[int],
    seed: int,
) -> dict[Point, Tensor]:
    """Images (N,3,64,64) of each point; image i is drawn from (seed, first + i) alone."""
    settings = experiment.generation(seed)
    mix = cfg(settings.base)
    images = {BASE: generate(policy, prompts, settings, {"": mix}, first=first)[""]}
    for b in budgets:
        images[MORE_STEPS, b] = generate(policy, prompts, replace(settings, steps=b * STEPS), {"": mix}, first=first)[""]
    for point, search in planned.items():
        searcher = Searcher(policy, mix, policy.sigmas(STEPS), settings, search, rounds_of(search, STEPS), reward)
        found = [searcher(prompt, first + i).latents[:1] for i, prompt in enumerate(prompts)]
        images[point] = searcher.decoded(torch.cat(found))
    return images


def compare(names: Sequence[str], out: Path, size: Size) -> dict[str, Any]:
    """Draw, judge and compare; writes `results.json`, `report.html` and `figure.png` into `out`, and returns the results."""
    from tqdm import tqdm

    begin = time.monotonic()
    judges, policy = experiment.judges(experiment.rewards()), experiment.load_base()
    captions = world.captions(size.prompts, "sampling")
    prompts = [c.text for c in captions for _ in range(size.per_prompt)]
    planned = searches(names, size.budgets)
    points = [*((MORE_STEPS, b) for b in size.budgets), *planned]
    real = world.real_renders(captions, 8 * size.per_prompt, 1)
    same = {"size": asdict(size), "weights": experiment.hashes()}
    summaries: dict[int, dict[str, Any]] = {}
    judged: dict[int, dict[Point, Any]] = {}
    for seed in size.seeds:
        study = Study(out / f"seed-{seed}", prompts, points, judges, {**same, "seed": seed})
        study.open(resume=True, overwrite=False)
        for part in tqdm(list(study.parts(size.chunk * size.per_prompt)), desc=f"seed {seed}", unit="chunk"):
            study.add(part, draw(policy, files.load_reward("proxy"), part.prompts, part.first, planned, size.budgets, seed))
        summaries[seed] = study.summarise({name: map(features, real.split(64)) for name, features in judges.features.items()})
        judged[seed] = {point: study.judged(point).per_prompt() for point in study.points}
    results = {
        "points": _points(judged, summaries, costs(planned, size.budgets)),
        "config": {"size": asdict(size), "searches": {f"{name}|{b}": asdict(search) for (name, b), search in planned.items()}},
        "weights": experiment.hashes(),
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_text(json.dumps(results, indent=1) + "\n", out / "results.json")
    sampling_page.write(out, results)
    return results


def _points(
    judged: Mapping[int, Mapping[Point, Mapping[str, Tensor]]], summaries: Mapping[int, Mapping[str, Any]], spent: Mapping[Point, Counts]
) -> list[dict[str, Any]]:
    """A row for each point: means over prompts and seeds, 95 % intervals over prompts of seed means, the mean of each seed, and FID.

    `against` has the paired differences to best-of-n with the same number of model calls, `at_cost` those to best-of-n of the same
    `tflop`, interpolated over its logarithm; a point that costs more than every best-of-n has none.
    """
    rows: list[dict[str, Any]] = []
    ladder = [BASE, *(point for point in spent if point[0] == REFERENCE)]
    for point, counts in spent.items():
        figures = {name: torch.stack([one[point][name] for one in judged.values()]) for name in FIGURES}  # (seeds, prompts)
        row: dict[str, Any] = {"method": "base" if point == BASE else point[0], "budget": max(1, point[1]), "cost": asdict(counts)}
        row["tflop"] = tflop(counts)
        row |= {name: float(values.mean()) for name, values in figures.items()}
        row["ci"] = {name: _interval(values) for name, values in figures.items()}
        row["seeds"] = {name: values.mean(1).tolist() for name, values in figures.items()}
        fids = [_row(summary, point)["fid"] for summary in summaries.values()]
        row |= {"fid": sum(fids) / len(fids), "fid_seeds": fids}
        reference = (REFERENCE, point[1])
        if reference in spent and point != reference and point != BASE:
            other = {name: torch.stack([one[reference][name] for one in judged.values()]) for name in FIGURES}
            row["against"] = {name: _difference(values, other[name]) for name, values in figures.items()}
            if shares := _between([tflop(spent[point]) for point in ladder], row["tflop"]):
                row["at_cost"] = {
                    name: _difference(values, torch.stack([_mixed(one, name, ladder, shares) for one in judged.values()]))
                    for name, values in figures.items()
                }
        rows.append(row)
    return rows


def tflop(counts: Counts) -> float:
    """What an image's counts take at SD1.5's shapes, in TFLOP."""
    return counts.model * TFLOP["model"] + counts.decodes * TFLOP["decodes"] + counts.rewards * TFLOP["rewards"]


def _between(ladder: Sequence[float], cost: float) -> dict[int, float]:
    """Weights of the two neighbours of a cost in an ascending ladder, by logarithms; {} above the last."""
    upper = next((i for i, one in enumerate(ladder) if i and one >= cost), 0)
    if not upper:
        return {}
    share = math.log(cost / ladder[upper - 1]) / math.log(ladder[upper] / ladder[upper - 1])
    return {upper - 1: 1 - share, upper: share}


def _mixed(judged: Mapping[Point, Mapping[str, Tensor]], name: str, ladder: Sequence[Point], shares: Mapping[int, float]) -> Tensor:
    return torch.stack([weight * judged[ladder[i]][name] for i, weight in shares.items()]).sum(0)


def _difference(values: Tensor, other: Tensor) -> list[float]:
    """Mean of the paired differences of (seeds, prompts) and its interval."""
    return [float((values - other).mean()), *_interval(values - other)]


def _interval(values: Tensor) -> list[float]:
    """95 % bootstrap interval over prompts of the mean of (seeds, prompts)."""
    low, high = bootstrap(lambda rows: values[:, rows].mean(), values.shape[1])
    return [float(low), float(high)]


def _row(summary: Mapping[str, Any], point: Point) -> Mapping[str, float]:
    return summary["base"] if point == BASE else next(p for p in summary["points"] if (p["model"], p["k"]) == point)


def names_of(given: Sequence[str]) -> list[str]:
    """The methods that are compared: those named and best-of-n, which the others are compared with; without any, all."""
    return list(dict.fromkeys([REFERENCE, *(given or METHODS)]))
