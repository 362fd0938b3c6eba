"""A LoRA trained on a fitted taste: does the person whose choices taught it like its images better?

Usage: PYTHONPATH=. python tools/embedded/taste_train.py WORK PERSON CHOICES SEED [UPDATES]. A simulated person of `trainer.demo.tastes`
makes CHOICES choices in WORK/pool.pt (`taste_pool.py`), the command `taste` fits a head to the file, and ImageReFL is trained on it with
the settings of docs/results.md. Judged are the LoRA alone and combined from step 12 on, against the base of the same prompts and noise, on
captions that no choice was about; the person's own utility is what no part of the training saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.__main__ import main as command
from trainer.data.images import to_pil
from trainer.demo import experiment, files, tastes, world
from trainer.demo.experiment import IMAGEREFL, START, generation, load_tuned
from trainer.guidance import combined
from trainer.metrics.study import BASE
from trainer.metrics.summary import intervals
from trainer.rewards.registry import load_reward
from trainer.rng import generator
from trainer.taste.choices import NAME, append, choice, save_image

RATE, BATCH, UPDATES = 4e-3, 16, 60  # docs/results.md's
PROMPTS, PER_PROMPT = 48, 4
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


def main(root: Path, person: str, number: int, seed: int, updates: int = UPDATES) -> None:
    """Judge, fit, train, evaluate; print a table and write figures beside the LoRA."""
    work = root / f"{person}-{number}"
    work.mkdir(parents=True, exist_ok=True)
    choices, taste = judge_pairs(work, person, number), work / "taste.safetensors"
    assert command(["taste", str(choices), "--tower", "demo-proxy", "--out", str(taste), "--overwrite"]) == 0
    reward = load_reward(f"taste@{taste}", True)
    known = set(torch.load(root / "pool.pt", weights_only=True)["prompts"])
    captions = [c for c in world.captions(4 * PROMPTS, "taste, held out") if c.text not in known][:PROMPTS]
    rewards = {"taste": reward, "person": tastes.Person(person, files.load_reader()), **experiment.rewards()}
    out = work / f"seed{seed}-{updates}"
    config = experiment.train_config(
        out, "imagerefl", IMAGEREFL, RATE, every=updates, watched=8, batch_size=BATCH, seed=seed, steps=updates
    )
    watched = [c.text for c in world.captions(8, "validation")]
    experiment.train(config, experiment.renders(1024, seed), watched, experiment.rewards(), reward=reward)
    settings = generation(7)
    mixes = {("tuned", k): combined(settings.base, settings.tuned("tuned"), k) for k in (0, START)}
    policy = load_tuned({"tuned": out / "lora.safetensors"})
    found = experiment.evaluate(out, policy, mixes, captions, PER_PROMPT, rewards, settings.seed)
    base, rows = found.judged[BASE], dict[str, Any]()
    spread = {name: float(values.std()) for name, values in base.per_prompt().items()}
    print(f"| {person}, {number} choices, seed {seed} | " + " | ".join(FIGURES) + " |\n" + "|---" * (1 + len(FIGURES)) + "|")
    print("| base | " + " | ".join(f"{base.means()[name]:.3f}" for name in FIGURES) + " |")
    for point, judged in found.judged.items():
        if point[0] == "tuned":
            gap, between = intervals(judged, base), judged.means()
            rows[str(point[1])] = {name: [between[name] - base.means()[name], *gap[name]] for name in FIGURES}
            cells = (f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in rows[str(point[1])].values())
            print(f"| {'alone' if point[1] == 0 else f'combined from step {point[1]}'} | " + " | ".join(cells) + " |")
    shown = {name: base.means()[name] for name in FIGURES}
    (out / "figures.json").write_text(json.dumps({"base": shown, "spread": spread, "gain": rows}, indent=1))
    some = torch.stack([torch.stack([found.images[p][i] for i in range(0, 8 * PER_PROMPT, PER_PROMPT)]) for p in found.judged])
    torch.save(some, out / "shown.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
