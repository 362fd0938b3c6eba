"""The comparison of docs/results.md: base, ReFL and ImageReFL, alone and combined, with the usual baselines.

    python -m tools.embedded.results grid FOLDER          # learning rates, on a seed and prompts of their own
    python -m tools.embedded.results seed FOLDER SEED     # one training seed; finished seeds are kept
    python -m tools.embedded.results table FOLDER OUT.md

Equal optimizer steps and batch for both methods, the same test prompts and sampling seeds for all models.
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

from trainer.demo import experiment, page, world
from trainer.demo.experiment import GUIDANCE, OBJECTIVES, START, STEPS, generation, load_tuned, switched, train_config
from trainer.demo.show import FULL, RATES
from trainer.guidance import Slot, combined
from trainer.lora.file import save_lora
from trainer.metrics.study import BASE
from trainer.metrics.summary import frontier_area
from trainer.runtime.files import write_text
from trainer.training.run import Run

from . import tables
from .tables import Claim

log = logging.getLogger(__name__)

SWITCHES = (0, 8, 12, 16)
STRENGTHS = (0.25, 0.5, 0.75)
SAMPLING_SEED = 1234  # the same test noise for every training seed
GRID_SEED = 9  # of the runs that choose the learning rate
EVERY = 8  # steps between the points of the training curves, and between the LoRAs that early stopping may pick
CLAIMS: tuple[Claim, ...] = (
    ("ReFL raises held-out reward", "heldout", "refl|0", "base|0"),
    ("ReFL raises gold", "gold", "refl|0", "base|0"),
    ("ReFL loses diversity (to the unguided base)", "diversity", "refl|0", f"base_unguided|{STEPS}"),
    ("combined generation wins diversity back", "diversity", f"refl|{START}", "refl|0"),
    ("… at this change of held-out reward", "heldout", f"refl|{START}", "refl|0"),
    ("ImageReFL against ReFL, both combined: held-out", "heldout", f"imagerefl|{START}", f"refl|{START}"),
    ("ImageReFL against ReFL, both combined: diversity", "diversity", f"imagerefl|{START}", f"refl|{START}"),
)


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


def run_seed(folder: Path, seed: int, size: Size) -> dict[str, Any]:
    """One training seed: train, generate, judge. The test set does not depend on the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = train_both(folder, seed, size, RATES)
    early = early_stop(curves["refl"], curves["imagerefl"])
    loras = {name: folder / name / "lora.safetensors" for name in RATES}
    strengths = {f"refl at {100 * s:.0f} %": s for s in STRENGTHS}
    weaker = {**dict.fromkeys(strengths, loras["refl"]), f"refl at step {early}": folder / f"refl-{early:04d}.safetensors"}
    tuned = generation(SAMPLING_SEED).tuned
    mixes = switched(loras, SWITCHES) | switched(weaker, (0,))
    mixes |= {(f"{name}, base unguided", START): combined(Slot("base"), tuned(name), START) for name in loras}
    policy, captions = load_tuned({**loras, **weaker}, strengths), world.captions(size.prompts, "results")
    evaluated = experiment.evaluate(folder, policy, mixes, captions, size.per_prompt, experiment.rewards(), SAMPLING_SEED)
    return {
        **evaluated.results(),
        "seed": seed,
        "config": vars(size),
        "curves": curves,
        "per_prompt": tables.per_prompt(evaluated.judged),
    }


def run_grid(folder: Path, rates: Sequence[float], size: Size) -> dict[str, Any]:
    """Both methods at each learning rate, on a fourth seed and prompts that no result uses.

    A method's choice is the rate with the largest frontier area on the held-out axis, over START and 0.
    """
    captions = world.captions(size.prompts, "validation grid")
    rows: list[dict[str, Any]] = []
    for rate in rates:
        place = folder / f"{rate:g}"
        train_both(place, GRID_SEED, size, dict.fromkeys(RATES, rate))
        loras = {name: place / name / "lora.safetensors" for name in RATES}
        mixes = switched(loras, (0, START))
        evaluated = experiment.evaluate(place, load_tuned(loras), mixes, captions, size.per_prompt, experiment.rewards(), SAMPLING_SEED)
        for name in RATES:
            judged = {k: evaluated.judged[name, k] for k in (0, START)}
            area = frontier_area(list(judged.values()), evaluated.judged[BASE], "heldout")
            rows.append({"model": name, "lr": rate, "area": area, "points": {str(k): j.means() for k, j in judged.items()}})
    return {"seed": GRID_SEED, "config": vars(size), "rows": rows}


def early_stop(refl: list[dict[str, float]], imagerefl: list[dict[str, float]]) -> int:
    """The first kept step at which ReFL's reward on the validation prompts reaches ImageReFL's last one."""
    goal = imagerefl[-1]["reward"]
    kept = [p for p in refl if p["step"] >= EVERY]
    return int(next((p["step"] for p in kept if p["reward"] >= goal), kept[-1]["step"]))


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every finished seed."""
    size = Size(**runs[0]["config"])
    out = [
        f"{size.updates} optimizer steps of {size.batch} for both methods; {size.prompts} test prompts × {size.per_prompt} images; "
        f"{STEPS} ancestral steps, base guidance {GUIDANCE:g}, tuned model unguided; headline k = {START}, the training start index.",
        "",
    ]
    for run in runs:
        out += [f"### Training seed {run['seed']}", ""]
        out += tables.header(["model", "k", "proxy", "held-out", "gold", "diversity", "of base", "FID", "LogCov"])
        rows = [({"model": name, "k": STEPS, **run[name]}, {}) for name in ("base", "base_unguided")]
        rows += zip(run["points"], run["ci"]["points"])
        for values, ci in rows:
            cells = [_cell(values, ci, axis) for axis in ("reward", "heldout", "gold", "diversity")]
            share = f"{100 * values['diversity'] / run['base']['diversity']:.0f} %"
            out.append(tables.row([values["model"], values["k"], *cells, share, f"{values['fid']:.2f}", f"{values['logcov']:.2f}"]))
        areas = [(m, run["frontier"][m]) for m in RATES]
        figures = ", ".join(f"{m} {a['heldout']:.3f} (proxy {a['reward']:.3f}, gold {a['gold']:.3f})" for m, a in areas)
        out += ["", f"Frontier area, held-out axis: {figures}.", ""]
    return "\n".join(out)


def _cell(values: Mapping[str, Any], ci: Mapping[str, list[float]], axis: str) -> str:
    return f"{values[axis]:.3f}" + (f" ({ci[axis][0]:+.2f} … {ci[axis][1]:+.2f})" if axis in ci else "")


def curves_figure(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Proxy, held-out, gold and diversity over training: the mean of the seeds, and their range as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for panel, method in zip(figure.subplots(1, 2, sharey=True), RATES):
        steps = [p["step"] for p in runs[0]["curves"][method]]
        for axis, label in (*page.AXES, ("diversity", "diversity, relative")):
            values = torch.tensor([[p[axis] for p in run["curves"][method]] for run in runs])
            values = values / values[:, :1] - 1 if axis == "diversity" else values - values[:, :1]
            (line,) = panel.plot(steps, values.mean(0), label=label)
            panel.fill_between(steps, values.amin(0), values.amax(0), alpha=0.2, color=line.get_color())
        panel.set_title(f"{page.title(method)}, tuned model alone (k = 0)")
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def main() -> None:
    """Run one seed, or write the tables."""
    parser = argparse.ArgumentParser(description="The comparison of docs/results.md")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("seed", help="train and judge one seed")
    one.add_argument("folder", type=Path)
    one.add_argument("seed", type=int)
    grid = commands.add_parser("grid", help="both methods at several learning rates")
    grid.add_argument("folder", type=Path)
    grid.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    for command in (one, grid):
        command.add_argument("--updates", type=int, default=48)
        command.add_argument("--batch", type=int, default=16)
        command.add_argument("--prompts", type=int, default=32)
        command.add_argument("--per-prompt", type=int, default=4)
        command.add_argument("--threads", type=int, default=1)
    finished = commands.add_parser("table", help="write the tables of all finished seeds")
    finished.add_argument("folder", type=Path)
    finished.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        runs = [tables.load(path) for path in sorted(a.folder.glob("seed*.json"))]
        if not runs:
            raise SystemExit(f"no finished seed in {a.folder}")
        write_text(f"{table(runs)}\n### The claims\n\n{tables.claims(runs, CLAIMS)}\n", a.out)
        curves_figure(runs).savefig(a.out.with_suffix(".png"), dpi=100)
        return
    torch.set_num_threads(a.threads)
    target = a.folder / ("grid.json" if a.command == "grid" else f"seed{a.seed}.json")
    if target.is_file():
        log.info("%s is finished", target)
        return
    size, folder = Size(a.updates, a.batch, a.prompts, a.per_prompt), target.with_suffix("")
    result = run_grid(folder, a.rates, size) if a.command == "grid" else run_seed(folder, a.seed, size)
    write_text(json.dumps(result) + "\n", target)


if __name__ == "__main__":
    main()
