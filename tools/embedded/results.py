"""The comparison of docs/results.md: base, ReFL and ImageReFL, alone and combined, with the baselines every user asks about.

    python -m tools.embedded.results grid FOLDER          # learning rates, on a seed and prompts of their own
    python -m tools.embedded.results seed FOLDER SEED     # one training seed; finished seeds are left alone
    python -m tools.embedded.results table FOLDER OUT.md

Equal optimizer steps and batch for both methods, the same test prompts and sampling seeds for all models.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from trainer.data.samples import encode_images
from trainer.demo import files, show, world
from trainer.demo.show import GUIDANCE, START, STEPS
from trainer.generate import Generation, generate
from trainer.guidance import Slot, cfg, combined
from trainer.lora.file import load_lora, save_lora
from trainer.metrics.intervals import bootstrap
from trainer.metrics.summary import frontier_area, intervals
from trainer.models.unet import UNetPolicy
from trainer.training.run import Run

log = logging.getLogger(__name__)

SWITCHES = (0, 8, 12, 16)
STRENGTHS = (0.25, 0.5, 0.75)
SAMPLING_SEED = 1234  # the same test noise for every training seed
GRID_SEED = 9  # of the runs that choose the learning rate
EVERY = 8  # steps between the points of the training curves, and between the LoRAs that early stopping may pick


def train_both(folder: Path, seed: int, size: show.DemoSize, tuning: show.Tuning) -> dict[str, list[dict[str, float]]]:
    """Train ReFL and ImageReFL, keeping every `EVERY`th adapter; returns the training curves."""
    base = UNetPolicy.load(files.PIPELINE)
    samples = encode_images(base, *world.real_images(size.real, seed))
    watched = [c.text for c in world.captions(6, "validation") for _ in range(4)]
    curves: dict[str, list[dict[str, float]]] = {}
    for method in ("refl", "imagerefl"):
        curve = show.Curve(show.judges(), watched, EVERY, seed, folder / method)

        def on_step(run: Run, curve: show.Curve = curve, method: str = method) -> None:
            curve(run)
            if run.step % EVERY == 0:
                save_lora(run.policy, folder / f"{method}-{run.step:04d}.safetensors", run.metadata())

        show.train_one(show.train_config(method, folder / method, size, tuning, seed), samples, on_step)
        curves[method] = curve.points()
    return curves


def _load(path: Path, strength: float = 1.0) -> UNetPolicy:
    policy = UNetPolicy.load(files.PIPELINE)
    load_lora(policy, path, strength)
    return policy


def run_seed(folder: Path, seed: int, updates: int, batch: int, prompts: int, per_prompt: int) -> dict[str, Any]:
    """One training seed: train, generate, judge. The test set does not depend on the seed."""
    size = show.DemoSize(refl_updates=updates, imagerefl_updates=updates, batch=batch, prompts=prompts, per_prompt=per_prompt)
    folder.mkdir(parents=True, exist_ok=True)
    curves = train_both(folder, seed, size, show.Tuning())
    bench = show.Bench(world.captions(prompts, "results"), per_prompt, 1)
    base_policy, tuned = UNetPolicy.load(files.PIPELINE), {m: _load(folder / m / "lora.safetensors") for m in ("refl", "imagerefl")}
    judged = {key: bench(images) for key, images in show.draw(base_policy, tuned, bench.texts, SWITCHES, SAMPLING_SEED).items()}
    early = early_stop(curves["refl"], curves["imagerefl"])
    weaker = {f"refl x{s}": _load(folder / "refl" / "lora.safetensors", s) for s in STRENGTHS}
    weaker[f"refl at step {early}"] = _load(folder / f"refl-{early:04d}.safetensors")
    settings = Generation(steps=STEPS, guidance_scale=GUIDANCE, seed=SAMPLING_SEED)
    mixes = {(name, 0): cfg(settings.tuned(model=name)) for name in weaker}
    mixes |= {(f"{name}, base unguided", START): combined(Slot("base"), settings.tuned(model=name), START) for name in tuned}
    drawn = generate(base_policy, bench.texts, settings, mixes, {**weaker, **tuned})
    judged |= {key: bench(images) for key, images in drawn.items()}
    base = judged.pop(("base", STEPS))
    unguided = judged.pop(("base_unguided", STEPS))
    everything = {**judged, ("base", STEPS): base, ("base unguided", STEPS): unguided}
    return {
        "seed": seed,
        "updates": updates,
        "batch": batch,
        "prompts": prompts,
        "per_prompt": per_prompt,
        "base": base.means(),
        "base_unguided": unguided.means(),
        "points": [{"model": n, "k": k, **j.means(), "ci": intervals(j, base)} for (n, k), j in judged.items()],
        "frontier": {m: {a: frontier_area([judged[m, k] for k in SWITCHES], base, a) for a in bench.rewards} for m in tuned},
        "curves": curves,
        "per_prompt_values": {
            f"{n}|{k}": {**{r: v.tolist() for r, v in j.rewards.items()}, "diversity": j.diversity.tolist()}
            for (n, k), j in everything.items()
        },
    }


def run_grid(folder: Path, rates: tuple[float, ...], updates: int, batch: int, prompts: int, per_prompt: int) -> dict[str, Any]:
    """Both methods at each learning rate, on a fourth seed and prompts that no result uses.

    A method's choice is the rate with the largest frontier area on the held-out axis, over START and 0.
    """
    bench = show.Bench(world.captions(prompts, "validation grid"), per_prompt, 1)
    base_policy = UNetPolicy.load(files.PIPELINE)
    rows: list[dict[str, Any]] = []
    for rate in rates:
        size = show.DemoSize(refl_updates=updates, imagerefl_updates=updates, batch=batch)
        train_both(folder / f"{rate:g}", GRID_SEED, size, show.Tuning(refl_lr=rate, imagerefl_lr=rate))
        tuned = {m: _load(folder / f"{rate:g}" / m / "lora.safetensors") for m in ("refl", "imagerefl")}
        judged = {k: bench(i) for k, i in show.draw(base_policy, tuned, bench.texts, (0, START), SAMPLING_SEED).items()}
        base = judged["base", STEPS]
        for name in tuned:
            points = {str(k): judged[name, k].means() for k in (0, START)}
            area = frontier_area([judged[name, k] for k in (0, START)], base, "heldout")
            rows.append({"model": name, "lr": rate, "area": area, "points": points})
    return {"seed": GRID_SEED, "updates": updates, "batch": batch, "prompts": prompts, "per_prompt": per_prompt, "rows": rows}


def early_stop(refl: list[dict[str, float]], imagerefl: list[dict[str, float]]) -> int:
    """The first kept step at which ReFL's reward on the validation prompts reaches ImageReFL's last one."""
    goal = imagerefl[-1]["reward"]
    kept = [p for p in refl if p["step"] >= EVERY]
    return int(next((p["step"] for p in kept if p["reward"] >= goal), kept[-1]["step"]))


def table(folder: Path) -> str:
    """Markdown of every finished seed."""
    runs = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("seed*.json"))]
    if not runs:
        raise SystemExit(f"no finished seed in {folder}")
    first = runs[0]
    out = [
        f"{first['updates']} optimizer steps of {first['batch']} for both methods; "
        f"{first['prompts']} test prompts × {first['per_prompt']} images; "
        f"{STEPS} ancestral steps, base guidance {GUIDANCE:g}, tuned model unguided; headline k = {START}, the training start index.",
        "",
    ]
    for run in runs:
        out += [f"### Training seed {run['seed']}", "", "| model | k | proxy | held-out | gold | diversity | of base | FID | LogCov |"]
        out += ["|---|---|---|---|---|---|---|---|---|"]
        rows = [("base", STEPS, run["base"], None), ("base, unguided", STEPS, run["base_unguided"], None)]
        rows += [(p["model"], p["k"], p, p["ci"]) for p in run["points"]]
        for name, k, values, ci in rows:
            cells = [_cell(values, ci, axis) for axis in ("reward", "heldout", "gold", "diversity")]
            share = values["diversity"] / run["base"]["diversity"]
            out.append(f"| {name} | {k} | {' | '.join(cells)} | {100 * share:.0f} % | {values['fid']:.2f} | {values['logcov']:.2f} |")
        areas = ", ".join(f"{m} {a['heldout']:.3f} (proxy {a['reward']:.3f}, gold {a['gold']:.3f})" for m, a in run["frontier"].items())
        out += ["", f"Frontier area, held-out axis: {areas}.", ""]
    return "\n".join(out)


def curves_figure(folder: Path) -> Any:
    """Proxy, held-out, gold and diversity over training: the mean of the seeds, and their range as a band."""
    from matplotlib.figure import Figure

    runs = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("seed*.json"))]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for panel, method in zip(figure.subplots(1, 2, sharey=True), ("refl", "imagerefl")):
        steps = [p["step"] for p in runs[0]["curves"][method]]
        for axis, label in (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("diversity", "diversity, ratio")):
            values = torch.tensor([[p[axis] for p in run["curves"][method]] for run in runs])
            values = values / values[:, :1] if axis == "diversity" else values - values[:, :1]
            (line,) = panel.plot(steps, values.mean(0), label=label)
            panel.fill_between(steps, values.amin(0), values.amax(0), alpha=0.2, color=line.get_color())
        panel.set_title({"refl": "ReFL", "imagerefl": "ImageReFL"}[method] + ", tuned model alone (k = 0)")
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def _cell(values: dict[str, Any], ci: dict[str, list[float]] | None, axis: str) -> str:
    if ci is None:
        return f"{values[axis]:.3f}"
    return f"{values[axis]:.3f} ({ci[axis][0]:+.2f} … {ci[axis][1]:+.2f})"


def claims(folder: Path) -> str:
    """The paper's claims, each as a paired difference over prompts, per seed, with its 95 % interval."""
    out = ["| claim | seed | difference | 95 % interval |", "|---|---|---|---|"]
    tests = [
        ("ReFL raises held-out reward", "heldout", f"refl|{0}", f"base|{STEPS}"),
        ("ReFL raises gold", "gold", f"refl|{0}", f"base|{STEPS}"),
        ("ReFL loses diversity (to the unguided base)", "diversity", f"refl|{0}", f"base unguided|{STEPS}"),
        ("combined generation wins diversity back", "diversity", f"refl|{START}", f"refl|{0}"),
        ("… at this change of held-out reward", "heldout", f"refl|{START}", f"refl|{0}"),
        ("ImageReFL against ReFL, both combined: held-out", "heldout", f"imagerefl|{START}", f"refl|{START}"),
        ("ImageReFL against ReFL, both combined: diversity", "diversity", f"imagerefl|{START}", f"refl|{START}"),
    ]
    for path in sorted(folder.glob("seed*.json")):
        run = json.loads(path.read_text("utf-8"))
        values = run["per_prompt_values"]
        for claim, axis, a, b in tests:
            difference = torch.tensor(values[a][axis]) - torch.tensor(values[b][axis])
            low, high = bootstrap(lambda rows, d=difference: d[rows].mean(), len(difference))
            out.append(f"| {claim} | {run['seed']} | {float(difference.mean()):+.3f} | {float(low):+.3f} … {float(high):+.3f} |")
    return "\n".join(out)


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
    tables = commands.add_parser("table", help="write the tables of all finished seeds")
    tables.add_argument("folder", type=Path)
    tables.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        a.out.write_text(f"{table(a.folder)}\n### The claims\n\n{claims(a.folder)}\n", "utf-8")
        curves_figure(a.folder).savefig(a.out.with_suffix(".png"), dpi=100)
        return
    torch.set_num_threads(a.threads)
    target = a.folder / ("grid.json" if a.command == "grid" else f"seed{a.seed}.json")
    if target.is_file():
        log.info("%s is finished", target)
        return
    size = (a.updates, a.batch, a.prompts, a.per_prompt)
    result = (
        run_grid(target.with_suffix(""), tuple(a.rates), *size) if a.command == "grid" else run_seed(target.with_suffix(""), a.seed, *size)
    )
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", "utf-8")
    os.replace(partial, target)


if __name__ == "__main__":
    main()
