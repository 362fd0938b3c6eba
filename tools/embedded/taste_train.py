"""A LoRA trained on a fitted taste: does the person whose choices taught it like its images better?

Usage: PYTHONPATH=. python tools/embedded/taste_train.py WORK PERSON CHOICES SEED [RATE UPDATES…]. A simulated person of
`trainer.demo.tastes` makes CHOICES choices in WORK/pool.pt (`taste_pool.py`), the command `taste` fits a head to the file, and ImageReFL is
trained on it. Judged are the LoRAs after each of UPDATES, alone and combined from step 12 on, on captions that no choice was about, against
the untrained model in their place (without guidance, as they are) under the same prompts and noise; the person's own utility is what no
part of the training saw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.__main__ import main as command
from trainer.data.images import to_pil
from trainer.demo import experiment, files, tastes, world
from trainer.demo.experiment import IMAGEREFL, START, generation, load_tuned
from trainer.guidance import Mix, Slot, combined
from trainer.lora.file import save_lora
from trainer.metrics.study import BASE, Point
from trainer.metrics.summary import intervals
from trainer.rewards.registry import load_reward
from trainer.rng import generator
from trainer.taste.choices import NAME, append, choice, save_image
from trainer.training.run import Run

RATE, BATCH, UPDATES = 1e-3, 16, (10, 20)
PROMPTS, PER_PROMPT = 32, 4
FIGURES = ("taste", "person", "heldout", "gold", "diversity", "match")


def judge_pairs(work: Path, person: str, number: int) -> Path:
    """A file of choices in `work`, made once."""
    path = work / NAME
    if path.exists():
        return path
    stored: dict[str, Any] = torch.load(work.parent / "pool.pt", weights_only=True)
    reader = files.load_reader()
    for i in range(number):
        images, prompt = stored["images"][2 * i : 2 * i + 2].float() / 255, stored["prompts"][i]
        worth = tastes.utility(person, images, [prompt, prompt], reader)
        first = bool(tastes.choose(worth[:1], worth[1:], generator("judge", person, i)))
        shown = [save_image(work, to_pil(image), seed=i) for image in images]
        append(path, choice("pair", prompt, shown, "chosen", int(not first), [0, 1] if i % 2 else [1, 0]))
    return path


def main(root: Path, person: str, number: int, seed: int, rate: float = RATE, *updates: int) -> None:
    """Judge, fit, train, evaluate; print a table and write figures beside the LoRA."""
    work = root / f"{person}-{number}"
    work.mkdir(parents=True, exist_ok=True)
    choices, taste = judge_pairs(work, person, number), work / "taste.safetensors"
    assert command(["taste", str(choices), "--tower", "demo-proxy", "--out", str(taste), "--overwrite"]) == 0
    reward = load_reward(f"taste@{taste}", True)
    known = set(torch.load(root / "pool.pt", weights_only=True)["prompts"])
    captions = [c for c in world.captions(4 * PROMPTS, "taste, held out") if c.text not in known][:PROMPTS]
    rewards = {"taste": reward, "person": tastes.Person(person, files.load_reader()), **experiment.rewards()}
    steps = updates or UPDATES
    out = work / f"seed{seed}-{rate:g}-{max(steps)}"
    kept = {f"{step} updates": out / f"{step:04d}.safetensors" for step in steps}
    config = experiment.train_config(
        out, "imagerefl", IMAGEREFL, rate, every=max(steps), watched=8, batch_size=BATCH, seed=seed, steps=max(steps)
    )

    def keep(run: Run) -> None:
        if run.step in steps:
            save_lora(run.policy, kept[f"{run.step} updates"], run.metadata())

    watched = [c.text for c in world.captions(8, "validation")]
    experiment.train(config, experiment.renders(1024, seed), watched, experiment.rewards(), keep, reward=reward)
    settings = generation(7)
    mixes = {(name, k): combined(settings.base, settings.tuned(name), k) for name in kept for k in (0, START)}
    mixes |= {("untrained", k): combined(settings.base, Slot("base"), k) for k in (0, START)}
    found = experiment.evaluate(out, load_tuned(kept), mixes, captions, PER_PROMPT, rewards, settings.seed)
    report(found, mixes, out, f"{person}, {number} choices, rate {rate:g}, seed {seed}")
    torch.save({str(p): found.images[p][: 8 * PER_PROMPT] for p in found.judged}, out / "shown.pt")


def report(found: experiment.Evaluated, mixes: Mapping[Point, Mix], out: Path, title: str) -> None:
    """Means of the guided base, and of each point its paired difference to the untrained model in its place, with a 95 % bootstrap over
    prompts; as a table and as JSON."""
    guided, gains = found.judged[BASE], dict[str, Any]()
    print(f"| {title} | " + " | ".join(FIGURES) + " |\n" + "|---" * (1 + len(FIGURES)) + "|")
    print("| base | " + " | ".join(f"{guided.means()[name]:.3f}" for name in FIGURES) + " |")
    for name, k in mixes:
        judged, base = found.judged[name, k], guided if name == "untrained" else found.judged["untrained", k]
        gap, means = intervals(judged, base), judged.means()
        row = {figure: [means[figure] - base.means()[figure], *gap[figure]] for figure in FIGURES}
        gains[f"{name}, {k}"] = row
        cells = (f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in row.values())
        print(f"| {name}, {'alone' if k == 0 else f'combined from step {k}'} | " + " | ".join(cells) + " |", flush=True)
    (out / "figures.json").write_text(json.dumps({"base": guided.means(), "gain": gains}, indent=1))


if __name__ == "__main__":
    work, who, number, seed, *more = sys.argv[1:]
    main(Path(work), who, int(number), int(seed), *map(float, more[:1]), *map(int, more[1:]))
