"""Every reward-gradient method on the embedded model under one budget of denoiser calls, on one page.

    python -m trainer compare refl srpo sqdf --budget 12000 --out DIR --seed 0
    python -m trainer.demo.compare grid FOLDER                    # learning rates, on a seed and prompts of their own
    python -m trainer.demo.compare table DIR0 DIR1 DIR2 OUT.md    # finished seeds side by side

A finished method is left alone, an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, plain
from ..data.samples import Samples, encode_images
from ..lora.file import load_consistency, load_lora
from ..metrics.intervals import bootstrap
from ..metrics.summary import Judged, frontier_area, intervals
from ..models.unet import UNetPolicy
from ..policy import Lora
from ..reward import Reward
from ..rewards.two_tower import TwoTower
from ..runtime.files import file_hash
from ..training.config import TrainConfig, Watch
from ..training.console import follow
from ..training.evaluation import Evaluation
from ..training.folder import CHECKPOINT, WATCH
from ..training.parts import Parts
from ..training.run import Run
from . import files, show, world
from .show import GUIDANCE, START, STEPS

log = logging.getLogger(__name__)

SWITCHES = (0, START)
GRID_SEED = 9
SAMPLING_SEED = 1234  # the same test noise for every training seed
RATES = (1e-3, 2e-3, 4e-3)
WORDS = (("crisp", "vivid", "shaded"), ("blurred", "pale", "flat"))  # what this world has of finish, and of its lack


@dataclass(frozen=True)
class Method:
    """A method as it is run here: objective settings, learning rate, and about how many calls a sample costs."""

    title: str
    calls: float  # per sample, for the spacing of the watch alone
    lr: float
    objective: dict[str, Any] = field(default_factory=dict)


_LATE = {"grad_from": START, "grad_to": STEPS - 1}
_KNOWN = {"sigma_high": 0.95, "sigma_low": 0.4, "guidance_scale": 1.0}  # the authors: 0.95 down to 0.4 suits most models
METHODS: dict[str, Method] = {
    "refl": Method("ReFL", 18.5, 2e-3, _LATE),
    "imagerefl": Method(
        "ImageReFL", 9.8, 1e-3, {**_LATE, "start_from": START, "start_to": START, "refl_share": 0.25, "diffusion_weight": 0.05}
    ),
    "draft-k": Method("DRaFT-8", 36, 4e-3, {"k": STEPS - START, "guidance_scale": 1.0, "recompute": False}),
    "draft-lv": Method("DRaFT-LV", 28, 4e-3, {"guidance_scale": 1.0, "recompute": False}),
    "alignprop": Method("AlignProp", 27, 2e-3, {"cut_mean": 17.0, "cut_std": 2.0, "guidance_scale": 1.0, "recompute": False}),
    "drtune": Method("DRTune", 22, 2e-3, {"k": 4, "early_stop": 8, "guidance_scale": 1.0, "recompute": False}),
    "direct-align": Method("Direct-Align", 23, 4e-3, _KNOWN),
    "srpo": Method("SRPO", 23, 4e-3, {**_KNOWN, "positive": WORDS[0], "negative": WORDS[1]}),
    "sqdf": Method(
        "SQDF",
        12,
        2e-3,
        {"estimator": "consistency", "guidance_scale": 1.0, "alpha": 1.0, "buffer_gb": 0.02, "collect_every": 4},
    ),
}
"""Every method of the comparison. Steps are the embedded world's, guidance is off in training, as in the demo."""


@dataclass(frozen=True)
class Size:
    """How much a comparison does."""

    budget: int = 12_000
    batch: int = 16
    prompts: int = 32
    per_prompt: int = 4
    watched: int = 12  # validation prompts, four images each
    points: int = 8  # of the watch, over a run
    real: int = 1024


GRID = Size(points=14)  # more points: a rate is chosen by their mean
QUICK = Size(budget=1_500, batch=8, prompts=6, per_prompt=2, watched=3, real=128)


class Relative:
    """s⁺ − s⁻, averaged over the control words: what SRPO optimises here, but for κ."""

    differentiable = True

    def __init__(self, tower: TwoTower, std: float) -> None:
        self.tower, self.std = tower, std

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W), B prompts -> (B,) in standard deviations of the plain score."""
        scores = self.tower.scores(images, prompts, [f"{word}. " for words in WORDS for word in words])
        plus, minus = scores.chunk(2, dim=1)
        return (plus - minus).mean(1) / self.std


def judges() -> dict[str, Reward]:
    """Proxy, held-out, gold, and the relative score of the proxy."""
    tower = files.load_tower("proxy")
    assert tower.statistics is not None
    return {**show.judges(), "relative": Relative(tower, tower.statistics[1])}


def train_config(name: str, out: Path, size: Size, seed: int, lr: float | None = None) -> TrainConfig:
    """One method's run. Only the budget ends it; the watch keeps its points and the best adapter."""
    method = METHODS[name]
    every = max(1, round(size.budget / (method.calls * size.batch) / size.points))
    return TrainConfig(
        out=str(out),
        objective={"name": name, "steps": STEPS, **method.objective},
        images="demo",
        consistency="demo" if method.objective.get("estimator") == "consistency" else "",
        lora=Lora(rank=8, alpha=8.0),
        steps=100_000,
        budget=size.budget,
        batch_size=size.batch,
        learning_rate=method.lr if lr is None else lr,
        seed=seed,
        save_every=every,
        watch=Watch(every=every, heldout="demo-heldout", count=size.watched, images=4, guidance_scale=GUIDANCE),
    )


def train_one(config: TrainConfig, samples: Samples, watched: Sequence[str]) -> list[dict[str, float]]:
    """Train one method, or go on; returns its evaluations. Ctrl-C saves and raises KeyboardInterrupt."""
    folder = Path(config.out)
    if (folder / "lora.safetensors").is_file():
        return json.loads((folder / WATCH).read_text("utf-8"))
    policy = UNetPolicy.load(files.PIPELINE)
    if config.consistency:
        load_consistency(policy, files.CONSISTENCY)
    evaluation = Evaluation.of_run(config, policy, judges(), watched, files.load_reader().features)
    base = file_hash(files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    parts = Parts(policy, samples, files.load_reward("proxy"), evaluation=evaluation, base_hash=base)
    run = Run.start(config, parts, overwrite=True, resume=(folder / CHECKPOINT).is_file())
    for _ in follow(run):
        pass
    if not run.last:
        raise KeyboardInterrupt(f"saved {run.checkpoint_path} after step {run.step}; the same command goes on from there")
    return evaluation.points


def compare(names: Sequence[str], out: Path, size: Size, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """Train and judge every method into `out`; returns what `results.json` holds (the demo's keys)."""
    from .compare_report import write_report

    unknown = [n for n in names if n not in METHODS]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}: use some of {', '.join(METHODS)}")
    begin = time.monotonic()
    samples = encode_images(UNetPolicy.load(files.PIPELINE), *world.real_images(size.real, seed))
    watched = [c.text for c in world.captions(size.watched, "validation")]
    curves = {name: train_one(train_config(name, out / "runs" / name, size, seed), samples, watched) for name in names}
    bench = show.Bench(world.captions(size.prompts, "methods"), size.per_prompt, 1)
    bench.rewards = judges()
    base_policy = UNetPolicy.load(files.PIPELINE)
    tuned_policies: dict[str, UNetPolicy] = {}
    for name in names:
        for label, file in ((name, "lora"), (f"{name} best", "best")):
            tuned_policies[label] = UNetPolicy.load(files.PIPELINE)
            load_lora(tuned_policies[label], out / "runs" / name / f"{file}.safetensors")
    drawn = show.draw(base_policy, tuned_policies, bench.texts, SWITCHES, SAMPLING_SEED)  # all at once: they share the base's part
    judged: dict[tuple[str, int], Judged] = {key: bench(images) for key, images in drawn.items()}
    base, unguided = judged["base", STEPS], judged["base_unguided", STEPS]
    tuned = {key: value for key, value in judged.items() if not key[0].startswith("base")}
    labels = dict.fromkeys(name for name, _ in tuned)
    results: dict[str, Any] = {
        "base": show.figures(base),
        "base_unguided": show.figures(unguided),
        "points": [{"model": m, "k": k, **show.figures(j)} for (m, k), j in tuned.items()],
        "frontier": {m: {a: round(frontier_area([tuned[m, k] for k in SWITCHES], base, a), 4) for a in bench.rewards} for m in labels},
        "seed": seed,
        "n": len(bench.texts),
        "ci": {"points": [{"model": m, "k": k, **intervals(j, base)} for (m, k), j in tuned.items()]},
        "config": {"quick": quick, "size": plain(size), "methods": {n: {**plain(METHODS[n])} for n in names}},
        "curves": curves,
        "cost": {name: _cost(out / "runs" / name) for name in names},
        "per_prompt": {f"{m}|{k}": _per_prompt(j) for (m, k), j in judged.items()},
        "seconds": round(time.monotonic() - begin, 1),
        "peak_rss_mb": show.peak_rss_mb(),
    }
    _write(results, out / "results.json")
    write_report(out / "report.html", results, {f"{m}|{k}": i for (m, k), i in drawn.items()}, bench.texts, size.per_prompt)
    return results


def _cost(folder: Path) -> dict[str, float]:
    """Steps, calls, seconds of training, and the last eighth's mean KL where a method reports one."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    last = lines[-max(1, len(lines) // 8) :]
    kl = [line["kl"] for line in last if "kl" in line]
    return {"steps": lines[-1]["step"], "calls": lines[-1]["calls"], **({"kl": sum(kl) / len(kl)} if kl else {})}


def _per_prompt(judged: Judged) -> dict[str, list[float]]:
    return {**{r: v.tolist() for r, v in judged.rewards.items()}, "diversity": judged.diversity.tolist()}


def _write(results: Mapping[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(partial, path)


# -- the grid of learning rates, and the tables of the docs -----------------------------------------------------------------


def grid(folder: Path, names: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Every method at every rate, on a seed of its own; a method takes the rate with the best `grid_score`.

    Where the highest rate is the best, the double is tried too, until it is not.
    """
    samples = encode_images(UNetPolicy.load(files.PIPELINE), *world.real_images(size.real, GRID_SEED))
    watched = [c.text for c in world.captions(size.watched, "validation grid")]
    rows: list[dict[str, Any]] = []
    for name in names:
        tried: list[tuple[float, float]] = []
        rates = list(RATES)
        while rates:
            rate = rates.pop(0)
            points = train_one(train_config(name, folder / f"{name}-{rate:g}", size, GRID_SEED, rate), samples, watched)
            rows.append({"method": name, "lr": rate, "score": grid_score(points), "points": points})
            log.info("%s at %g: %.3f", name, rate, rows[-1]["score"])
            tried.append((rows[-1]["score"], rate))
            if not rates and max(tried)[1] == rate:
                rates = [2 * rate]
    return rows


def grid_score(points: Sequence[Mapping[str, float]]) -> float:
    """Mean held-out reward over the second half of a run's points: one point is too noisy to choose by."""
    half = points[len(points) // 2 :]
    return sum(p["heldout"] for p in half) / len(half)


AXES = (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("relative", "s⁺ − s⁻"))


def table(folders: Sequence[Path]) -> str:
    """Markdown of several finished seeds: gains over the guided base, each cell one figure per seed."""
    runs = [json.loads((f / "results.json").read_text("utf-8")) for f in folders]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    out = [f"Training seeds {seeds}; {runs[0]['n']} test images; gains over the guided base. `best` is the best held-out checkpoint.", ""]
    out += ["| model | k | " + " | ".join(label for _, label in AXES) + " | diversity of base | FID |", "|---|---|---|---|---|---|---|---|"]
    keys = [("base_unguided", STEPS), *((p["model"], p["k"]) for p in runs[0]["points"])]
    for model, k in keys:
        points = [_point(run, model, k) for run in runs]
        gains = [" / ".join(f"{p[a] - run['base'][a]:+.2f}" for p, run in zip(points, runs)) for a, _ in AXES]
        share = " / ".join(f"{100 * p['diversity'] / run['base']['diversity']:.0f} %" for p, run in zip(points, runs))
        fid = " / ".join(f"{p['fid']:.0f}" for p in points)
        out.append(f"| {_title(model)} | {k} | {' | '.join(gains)} | {share} | {fid} |")
    return "\n".join(out)


def mean_of(folders: Sequence[Path]) -> dict[str, Any]:
    """The figures of several seeds averaged, in the shape of one seed's `results.json` as far as the frontier needs it."""
    runs = [_load(f) for f in folders]

    def mean(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {k: sum(p[k] for p in points) / len(points) for k, v in points[0].items() if isinstance(v, float)}

    keys = [(p["model"], p["k"]) for p in runs[0]["points"]]
    points = [{"model": m, "k": k, **mean([_point(run, m, k) for run in runs])} for m, k in keys]
    bases = {name: mean([run[name] for run in runs]) for name in ("base", "base_unguided")}
    return {**bases, "points": points, "curves": runs[0]["curves"]}


def _title(model: str) -> str:
    name, _, rest = model.partition(" ")
    return f"{METHODS[name].title} {rest}".strip() if name in METHODS else model.replace("_", ", ")


def _point(run: Mapping[str, Any], model: str, k: int) -> dict[str, float]:
    if model in ("base", "base_unguided"):
        return run[model]
    return next(p for p in run["points"] if p["model"] == model and p["k"] == k)


def own_objectives(folders: Sequence[Path]) -> str:
    """Each method's gain in what it optimises, tuned model alone against the base it was trained from, with its interval."""
    out = ["| method | optimises | " + " | ".join(f"seed {_load(f)['seed']}" for f in folders) + " |", "|---|---|" + "---|" * len(folders)]
    runs = [_load(f) for f in folders]
    for name in runs[0]["curves"]:
        axis = "relative" if name == "srpo" else "reward"
        cells = [_cell(run, axis, f"{name}|0", f"base_unguided|{STEPS}") for run in runs]
        out.append(f"| {METHODS[name].title} | {dict(AXES)[axis]} | {' | '.join(cells)} |")
    return "\n".join(out)


def pairs(folders: Sequence[Path], tests: Sequence[tuple[str, str, str, str]]) -> str:
    """Claims as paired differences over prompts: (sentence, axis, a, b) -> a − b per seed, with its 95 % interval."""
    runs = [_load(f) for f in folders]
    out = ["| claim | " + " | ".join(f"seed {run['seed']}" for run in runs) + " |", "|---|" + "---|" * len(runs)]
    for claim, axis, a, b in tests:
        if all(key in run["per_prompt"] for run in runs for key in (a, b)):
            out.append(f"| {claim} | {' | '.join(_cell(run, axis, a, b) for run in runs)} |")
    return "\n".join(out)


CLAIMS = (
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


def _load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


def _cell(run: Mapping[str, Any], axis: str, a: str, b: str) -> str:
    difference = torch.tensor(run["per_prompt"][a][axis]) - torch.tensor(run["per_prompt"][b][axis])
    statistic: Callable[[Tensor], Tensor] = lambda rows: difference[rows].mean()  # noqa: E731
    low, high = bootstrap(statistic, len(difference))
    return f"{float(difference.mean()):+.2f} ({float(low):+.2f} … {float(high):+.2f})"


def main() -> None:
    """The grid, or the tables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="The grid and the tables of docs/results.md")
    commands = parser.add_subparsers(dest="command", required=True)
    rates = commands.add_parser("grid")
    rates.add_argument("folder", type=Path)
    rates.add_argument("methods", nargs="*", default=list(METHODS))
    tables = commands.add_parser("table")
    tables.add_argument("folders", type=Path, nargs="+")
    tables.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        from .compare_report import frontier

        parts = ["### What each method optimises", own_objectives(a.folders), "### The claims", pairs(a.folders, CLAIMS)]
        a.out.write_text("\n\n".join([table(a.folders), *parts]) + "\n", "utf-8")
        frontier(mean_of(a.folders)).savefig(a.out.with_suffix(".png"), dpi=90)
        return
    torch.set_num_threads(1)
    a.folder.mkdir(parents=True, exist_ok=True)
    rows = grid(a.folder, a.methods, GRID)
    _write({"seed": GRID_SEED, "budget": GRID.budget, "rows": rows}, a.folder / f"grid-{'-'.join(a.methods)[:80]}.json")


if __name__ == "__main__":
    main()
