"""Base, few-step LoRA, and base → LoRA by calls an image: rewards and diversity, as JSON, a table and a figure.

    python -m tools.embedded.turbo docs/base-to-turbo                # writes .json and .png; a .json is drawn again

The few-step LoRA is the embedded model's consistency adapter, which takes no guidance; the base takes two calls a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.demo import experiment, files, world
from trainer.generate import Generation, generate
from trainer.guidance import Mix, Switch, cfg, combined
from trainer.lora.file import load_lora
from trainer.metrics.diversity import within_prompt_diversity
from trainer.metrics.intervals import bootstrap
from trainer.runtime.files import replacing, write_text

BASE, LORA, BOTH = "base alone", "few-step LoRA alone", "base → few-step LoRA"
ALONE = {BASE: (2, 4, 5, 6, 8, 10, 20), LORA: (2, 4, 8, 9, 16)}
COMBINED = ((4, 4, 3), (8, 8, 7), (8, 4, 3), (8, 8, 4), (20, 4, 3), (20, 8, 4))  # steps of the base, of the LoRA, and how many of those
FIGURES = ("heldout", "gold", "diversity")


def arrangements(policy: Any, settings: Generation) -> dict[str, tuple[str, int, Mix, Tensor]]:
    """By name: the line in the figure, calls an image, the denoisers and the noise levels."""
    found: dict[str, tuple[str, int, Mix, Tensor]] = {}
    for line, slot, each in ((BASE, settings.base, 2), (LORA, settings.tuned(), 1)):
        for steps in ALONE[line]:
            found[f"{line}, {steps} steps"] = line, each * steps, cfg(slot), policy.sigmas(steps)
    for base, tuned, last in COMBINED:
        levels, k = Switch(last=last).joined(policy.sigmas(base), policy.sigmas(tuned))
        name = f"base for {k} of {base}, LoRA for the last {last} of {tuned}"
        found[name] = BOTH, 2 * k + len(levels) - 1 - k, combined(settings.base, settings.tuned(), k), levels
    return found


@torch.no_grad()
def measure(prompts: int, images: int, seed: int) -> dict[str, Any]:
    """Means over prompts of every arrangement, with 95 % intervals by bootstrap over prompts."""
    policy = experiment.load_base()
    load_lora(policy, files.CONSISTENCY)
    settings = Generation(experiment.STEPS, "ddim", experiment.GUIDANCE, seed=seed)
    texts = [caption.text for caption in world.captions(prompts, "base to turbo") for _ in range(images)]
    made = arrangements(policy, settings)
    drawn = generate(policy, texts, settings, {n: m for n, (_, _, m, _) in made.items()}, grids={n: g for n, (_, _, _, g) in made.items()})
    judges, extractor = {name: files.load_raw_reward(name) for name in ("heldout", "gold")}, files.load_extractor()
    groups = torch.arange(prompts).repeat_interleave(images)
    rows: list[dict[str, Any]] = []
    for name, (line, calls, _, _) in made.items():
        values = {key: judge(drawn[name], texts).reshape(prompts, images).mean(1) for key, judge in judges.items()}
        values["diversity"] = within_prompt_diversity(extractor.features(drawn[name]).float(), groups)
        rows.append({"name": name, "line": line, "calls": calls, **{key: _bounded(each) for key, each in values.items()}})
    return {"prompts": prompts, "images": images, "seed": seed, "rows": rows}


def _bounded(values: Tensor) -> list[float]:
    """Mean of one figure a prompt (P,), and its 95 % interval."""
    low, high = bootstrap(lambda rows: values[rows].mean(), len(values))
    return [float(values.mean()), float(low), float(high)]


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| | calls an image | held-out | gold | diversity |", "|---|---|---|---|---|"]
    for row in sorted(found["rows"], key=lambda row: (row["calls"], row["line"])):
        cells = [f"{m:.2f} ({low:.2f}–{high:.2f})" for m, low, high in (row[key] for key in FIGURES)]
        lines.append(f"| {row['name']} | {row['calls']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(found: Mapping[str, Any]) -> Any:
    """Held-out reward and diversity over calls an image, a line for each way to draw."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3.9, 6.4), layout="constrained")
    panels: Sequence[Any] = drawn.subplots(2, 1, sharex=True)
    for panel, (key, label) in zip(panels, (("heldout", "held-out reward"), ("diversity", "diversity within a prompt"))):
        for number, (line, style) in enumerate(((BASE, "o-"), (LORA, "s-"), (BOTH, "D"))):
            rows = sorted((row for row in found["rows"] if row["line"] == line), key=lambda row: row["calls"])
            means, lows, highs = zip(*(row[key] for row in rows))
            bars = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
            calls = [row["calls"] * (1 + 0.015 * (number - 1)) for row in rows]  # intervals side by side
            panel.errorbar(calls, means, yerr=bars, fmt=style, markersize=3.5, linewidth=1, elinewidth=0.6, capsize=1.5, label=line)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.tick_params(labelsize=8)
    panels[1].set_xscale("log", base=2)
    panels[1].set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    panels[1].set_xlabel("network calls an image")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=1, fontsize=8, frameon=False)
    return drawn


def main() -> None:
    """Measure, or read what was measured, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    if not file.is_file():
        write_text(json.dumps(measure(args.prompts, args.images, args.seed), indent=1) + "\n", file)
    found = json.loads(file.read_text("utf-8"))
    print(table(found))
    with replacing(args.out.with_suffix(".png")) as partial:
        figure(found).savefig(partial, dpi=200, format="png")


if __name__ == "__main__":
    main()
