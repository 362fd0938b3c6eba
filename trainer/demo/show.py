"""The demo: train ReFL and ImageReFL on the embedded model, generate, evaluate, and write one page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, plain
from ..data.images import grid
from ..metrics.study import BASE
from ..metrics.summary import area_interval
from . import page, world
from .experiment import OBJECTIVES, START, Evaluated, evaluate, load_tuned, renders, rewards, switched, train, train_config


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does."""

    updates: int = 60
    batch: int = 16
    prompts: int = 40
    per_prompt: int = 4
    switches: tuple[int, ...] = (0, 6, 9, 12, 15, 17)
    real: int = 1024
    watched: int = 8


FULL = DemoSize()
QUICK = DemoSize(updates=12, prompts=16, per_prompt=4, switches=(0, 12, 16), real=384, watched=4)
RATES = {"refl": 4e-3, "imagerefl": 4e-3}
"""One rate for both methods, at which both saturate (docs/results.md)."""


def show(out: Path, *, quick: bool = False, seed: int = 0, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run the demo into `out`; returns what `results.json` holds."""
    begin, size = time.monotonic(), QUICK if quick else FULL
    if out.exists() and any(out.iterdir()) and not overwrite and not resume:
        raise ConfigError(f"{out} exists: add --overwrite to replace it, or --resume to continue")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    samples, judges = renders(size.real, seed), rewards()
    watched = [c.text for c in world.captions(size.watched, "watch", seed)]
    shared = {"every": 10, "watched": size.watched, "batch_size": size.batch, "seed": seed, "steps": size.updates}
    configs = {name: train_config(out / "runs" / name, name, OBJECTIVES[name], rate, **shared) for name, rate in RATES.items()}
    curves = {name: train(config, samples, watched, judges, resume=resume) for name, config in configs.items()}
    loras = {name: out / f"{name}.safetensors" for name in configs}
    for name, path in loras.items():
        path.write_bytes((out / "runs" / name / "lora.safetensors").read_bytes())
    captions, mixes = world.captions(size.prompts, "test", seed), switched(loras, size.switches)
    evaluated = evaluate(out, load_tuned(loras), mixes, captions, size.per_prompt, judges, seed, renders_seed=seed + 1)
    results = evaluated.results()
    results["ci"] |= _areas(evaluated, size.switches)
    results |= {
        "seed": seed,
        "config": {"quick": quick, "size": plain(size), "runs": {name: c.describe() for name, c in configs.items()}},
        "curves": curves,
        "seconds": round(time.monotonic() - begin, 1),
    }
    page.write(out, results, evaluated, "Reward up, diversity kept?", summary(results), "demo")
    overview_figure(results, evaluated, size.per_prompt).savefig(out / "overview.png", dpi=110)
    return results


def _areas(evaluated: Evaluated, switches: tuple[int, ...]) -> dict[str, Any]:
    """Intervals of both frontiers' areas on the held-out axis, and of ImageReFL's lead."""
    judged, base = evaluated.judged, evaluated.judged[BASE]
    lines = {name: [judged[name, k] for k in switches] for name in RATES}
    return {
        "frontier": {name: area_interval(points, base, "heldout") for name, points in lines.items()},
        "frontier_lead": area_interval(lines["imagerefl"], base, "heldout", lines["refl"]),
    }


def overview_figure(results: Mapping[str, Any], evaluated: Evaluated, per_prompt: int) -> Any:
    """One figure for a README: the same prompts (rows) and seeds (columns) from four models, and the frontier."""
    from matplotlib.figure import Figure

    rows, columns = 4, min(4, per_prompt)
    shown = {
        "base": BASE,
        "ReFL alone": ("refl", 0),
        f"base → ReFL at step {START}": ("refl", START),
        f"base → ImageReFL at step {START}": ("imagerefl", START),
    }
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    panels = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.35])
    chosen = [p * per_prompt + i for p in range(rows) for i in range(columns)]
    for panel, (caption, point) in zip(panels, shown.items()):
        panel.imshow(grid(evaluated.images[point][chosen], columns).permute(1, 2, 0).numpy(), interpolation="nearest")
        panel.set_title(caption, fontsize=10)
        panel.axis("off")
    page.frontier_panel(panels[4], results, "heldout", "held-out")
    panels[4].legend(fontsize=8)
    return figure


def summary(results: Mapping[str, Any]) -> str:
    """What happened, in sentences that follow the figures wherever they fall."""
    base, points = results["base"], {(p["model"], p["k"]): p for p in results["points"]}

    def change(point: Mapping[str, float]) -> str:
        kept = 100 * point["diversity"] / base["diversity"]
        return f"held-out reward {point['heldout'] - base['heldout']:+.2f}, {kept:.0f} % of the base model's diversity"

    return " ".join(
        f"{page.title(m)} alone: {change(points[m, 0])}; combined at k={START}: {change(points[m, START])}." for m in results["curves"]
    )
