"""The runs of docs/results.md: learning rates, and base, ReFL and ImageReFL, alone and combined, with the usual baselines.

    python -m tools.embedded.results grid FOLDER            # ReFL and ImageReFL at several learning rates
    python -m tools.embedded.results methods FOLDER         # every method of `trainer compare` at several learning rates
    python -m tools.embedded.results seed FOLDER SEED       # ReFL and ImageReFL from one training seed; finished seeds are kept

Grids have a seed and prompts of their own. `grid` and `seed` take equal optimizer steps and batches for both methods, and the same test
prompts and sampling seeds for all models. `tools.embedded.tables` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.demo import compare, experiment, world
from trainer.demo.experiment import OBJECTIVES, START, Evaluated, generation, load_tuned, switched, train_config
from trainer.demo.show import FULL, RATES
from trainer.guidance import Mix, Slot, combined
from trainer.lora.file import save_lora
from trainer.metrics.study import BASE, Point
from trainer.metrics.summary import frontier_area
from trainer.runtime.files import write_text
from trainer.training.run import Run

log = logging.getLogger(__name__)

SWITCHES = (0, 8, 12, 16)
STRENGTHS = (0.25, 0.5, 0.75)
GRID_SEED = 9  # of the runs that choose the learning rate
GRID = compare.Size(points=14)  # more evaluations: a rate is chosen by their mean
EVERY = 8  # steps between the points of the training curves, and between the LoRAs that early stopping may pick


@dataclass(frozen=True)
class Size:
    """How much one seed does."""

    updates: int
    batch: int
    prompts: int
    per_prompt: int


def train_both(folder: Path, seed: int, size: Size, rates: Mapping[str, float]) -> dict[str, list[dict[str, float]]]:
    """Train ReFL and ImageReFL, keeping every `EVERY`th adapter; returns the training curves."""
    samples, judges = experiment.renders(FULL.real, seed), experiment.rewards()
    watched = [c.text for c in world.captions(6, "validation")]
    settings = {"every": EVERY, "watched": 6, "batch_size": size.batch, "seed": seed, "steps": size.updates}
    curves: dict[str, list[dict[str, float]]] = {}
    for name, rate in rates.items():

        def keep(run: Run, name: str = name) -> None:
            if run.step % EVERY == 0:
                save_lora(run.policy, folder / f"{name}-{run.step:04d}.safetensors", run.metadata())

        config = train_config(folder / name, name, OBJECTIVES[name], rate, **settings)
        curves[name] = experiment.train(config, samples, watched, judges, keep, resume=False)
    return curves


def evaluate(
    folder: Path,
    loras: Mapping[str, Path],
    mixes: Mapping[Point, Mix],
    purpose: str,
    size: Size,
    strengths: Mapping[str, float] | None = None,
) -> Evaluated:
    """Images and figures of LoRAs on the prompts of a purpose; the test noise is the comparison's."""
    policy, captions = load_tuned(loras, strengths), world.captions(size.prompts, purpose)
    return experiment.evaluate(folder, policy, mixes, captions, size.per_prompt, experiment.rewards(), compare.SAMPLING_SEED)


def run_seed(folder: Path, seed: int, size: Size) -> dict[str, Any]:
    """One training seed: train, generate, evaluate. The test set does not depend on the seed."""
    curves = train_both(folder, seed, size, RATES)
    loras = {name: folder / name / "lora.safetensors" for name in RATES}
    strengths = {f"refl at {100 * s:.0f} %": s for s in STRENGTHS}
    early = folder / f"refl-{early_stop(curves['refl'], curves['imagerefl']):04d}.safetensors"
    weaker = {**dict.fromkeys(strengths, loras["refl"]), "refl stopped early": early}
    mixes = switched(loras, SWITCHES) | switched(weaker, (0,))
    mixes |= {(f"{name} after the unguided base", START): combined(Slot("base"), generation(0).tuned(name), START) for name in loras}
    evaluated = evaluate(folder, {**loras, **weaker}, mixes, "results", size, strengths)
    return evaluated.results() | {"seed": seed, "config": vars(size), "curves": curves}


def run_grid(folder: Path, rates: Sequence[float], size: Size) -> dict[str, Any]:
    """Both methods at each learning rate. A method's choice is the rate with the largest frontier area, held-out axis, over START and 0."""
    rows: list[dict[str, Any]] = []
    for rate in rates:
        place = folder / f"{rate:g}"
        train_both(place, GRID_SEED, size, dict.fromkeys(RATES, rate))
        loras = {name: place / name / "lora.safetensors" for name in RATES}
        judged = evaluate(place, loras, switched(loras, (0, START)), "validation grid", size).judged
        for name in RATES:
            points = {k: judged[name, k] for k in (0, START)}
            area = frontier_area(list(points.values()), judged[BASE], "heldout")
            rows.append({"model": name, "lr": rate, "area": area, "points": {str(k): j.means() for k, j in points.items()}})
    return {"seed": GRID_SEED, "config": vars(size), "rows": rows}


def run_methods(folder: Path, names: Sequence[str], rates: Sequence[float], size: compare.Size = GRID) -> dict[str, Any]:
    """Every method at every rate under one budget of denoiser calls; a method takes the rate with the best `grid_score`.

    Where the highest rate is the best, the double is tried too, until it is not.
    """
    samples, judges = experiment.renders(size.real, GRID_SEED), compare.rewards()
    watched = [c.text for c in world.captions(size.watched, "validation grid")]
    rows: list[dict[str, Any]] = []
    for name in names:
        tried: list[tuple[float, float]] = []
        left = list(rates)
        while left:
            rate = left.pop(0)
            config = compare.train_config(name, folder / f"{name}-{rate:g}", size, GRID_SEED, rate)
            points = experiment.train(config, samples, watched, judges)
            tried.append((grid_score(points), rate))
            log.info("%s at %g: %.3f", name, rate, tried[-1][0])
            rows.append({"method": name, "lr": rate, "score": tried[-1][0], "points": points})
            if not left and max(tried)[1] == rate:
                left = [2 * rate]
    return {"seed": GRID_SEED, "budget": size.budget, "rows": rows}


def grid_score(points: Sequence[Mapping[str, float]]) -> float:
    """Mean held-out reward over the second half of a run's evaluations: one point is too noisy to choose by."""
    half = points[len(points) // 2 :]
    return sum(p["heldout"] for p in half) / len(half)


def early_stop(refl: Sequence[Mapping[str, float]], imagerefl: Sequence[Mapping[str, float]]) -> int:
    """The first kept step at which ReFL's reward on the validation prompts reaches ImageReFL's last one."""
    goal = imagerefl[-1]["reward"]
    kept = [p for p in refl if p["step"] >= EVERY]
    return int(next((p["step"] for p in kept if p["reward"] >= goal), kept[-1]["step"]))


def main() -> None:
    """Run one of the commands."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="The runs of docs/results.md")
    commands = parser.add_subparsers(dest="command", required=True)
    seed = commands.add_parser("seed", help="train and evaluate ReFL and ImageReFL from one seed")
    grid = commands.add_parser("grid", help="ReFL and ImageReFL at several learning rates")
    methods = commands.add_parser("methods", help="every method at several learning rates")
    for command in (seed, grid, methods):
        command.add_argument("folder", type=Path)
        command.add_argument("--threads", type=int, default=1)
    for command in (seed, grid):
        for name, value in (("updates", 48), ("batch", 16), ("prompts", 32), ("per-prompt", 4)):
            command.add_argument(f"--{name}", type=int, default=value)
    seed.add_argument("seed", type=int)
    grid.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    methods.add_argument("names", nargs="*", default=list(compare.METHODS))
    methods.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    name = f"methods-{'-'.join(a.names)[:80]}" if a.command == "methods" else "grid" if a.command == "grid" else f"seed{a.seed}"
    folder = a.folder / name
    if (folder / "results.json").is_file():
        log.info("%s is finished", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if a.command == "methods":
        result = run_methods(folder, a.names, a.rates)
    else:
        size = Size(a.updates, a.batch, a.prompts, a.per_prompt)
        result = run_grid(folder, a.rates, size) if a.command == "grid" else run_seed(folder, a.seed, size)
    write_text(json.dumps(result, indent=1) + "\n", folder / "results.json")


if __name__ == "__main__":
    main()
