"""The demo: train ReFL and ImageReFL on the embedded model, generate, evaluate, and write one page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, plain
from ..runtime.files import named
from . import page, verdict, world
from .experiment import OBJECTIVES, evaluate, load_tuned, renders, rewards, switched, train, train_config


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
        raise ConfigError(f"{named(out)} exists: add --overwrite to replace it, or --resume to continue")
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
    results |= {
        "claim": verdict.of_run(results["per_prompt"]),
        "seed": seed,
        "config": {"quick": quick, "size": plain(size), "runs": {name: c.describe() for name, c in configs.items()}},
        "curves": curves,
        "seconds": round(time.monotonic() - begin, 1),
    }
    page.write_demo(out, results, evaluated)
    return results
