"""Is the embedded world fit for the experiment? Measured, not assumed: python -m tools.embedded.gates OUT.json"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.demo import experiment, files, world
from trainer.demo.architecture import Reader
from trainer.demo.experiment import START, STEPS
from trainer.demo.rater import Gold
from trainer.generate import generate
from trainer.guidance import cfg
from trainer.metrics.diversity import within_prompt_diversity
from trainer.models.unet import UNetPolicy
from trainer.rng import Rng
from trainer.sampling import end_of, trajectory

from .judge_gates import extractor_gates, reward_gates

JUDGED = 60  # prompts, of eight images each, that the rewards are measured on


@torch.no_grad()
def read_back(reader: Reader, images: Tensor, captions: list[world.Caption]) -> dict[str, float]:
    """Share of images in which the reader finds what their caption names: per attribute, and all of it jointly."""
    logits = [reader(part) for part in images.split(64)]
    seen = {name: torch.cat([part[name].argmax(1) for part in logits]).tolist() for name in world.ATTRIBUTES}
    right: dict[str, list[bool]] = {name: [] for name in world.ATTRIBUTES}
    joint: list[bool] = []
    for i, caption in enumerate(captions):
        hits = {a: seen[a][i] == world.attribute_index(a, v) for a, v in caption.named.items()}
        joint.append(all(hits.values()))
        for name, hit in hits.items():
            right[name].append(hit)
    return {"joint": sum(joint) / len(joint), **{name: sum(hits) / len(hits) for name, hits in right.items() if hits}}


@torch.no_grad()
def reconstruction(policy: UNetPolicy, reader: Reader, captions: list[world.Caption]) -> dict[str, Any]:
    """What the autoencoder keeps of renders: peak signal-to-noise ratio in dB, and what the reader still reads."""
    images = world.real_renders(captions, 1, 7)
    means = torch.cat([policy.encode(part)[0] for part in images.split(64)])
    rebuilt = torch.cat([policy.decode(part) for part in means.split(64)])
    decibels = -10 * (rebuilt - images).square().mean((1, 2, 3)).log10()
    return {"psnr": float(decibels.mean()), "rebuilt": read_back(reader, rebuilt, captions), "renders": read_back(reader, images, captions)}


@torch.no_grad()
def decided_after_the_switch(policy: UNetPolicy, prompts: list[str], prefixes: int, completions: int) -> dict[str, float]:
    """Share of the within-prompt variance of each reward that the steps from the switch on decide.

    Base samples are re-noised to the switch's level and completed several times by the base model.
    """
    texts = [p for p in prompts for _ in range(prefixes * completions)]
    settings = experiment.generation(31)
    sigmas = policy.sigmas(STEPS)
    scores: dict[str, list[Tensor]] = {name: [] for name in ("reward", "heldout", "gold")}
    rewards = experiment.rewards()
    starts = [i // completions for i in range(len(texts))]  # completions of one sample share its prefix
    for first in range(0, len(texts), 64):
        rows = range(first, min(first + 64, len(texts)))
        part = [texts[i] for i in rows]
        shared, own = Rng(settings.seed, 0, tuple(starts[i] for i in rows)), Rng(settings.seed, 1, tuple(rows))
        denoiser = policy.denoiser(part, guidance_scale=settings.guidance_scale)
        x = policy.start(shared.start_noise(policy.latent_shape), STEPS)
        x = end_of(x, trajectory(denoiser, x, sigmas, shared.step_noise(policy.latent_shape)))
        noised = policy.add_noise(x, own.normal("again", policy.latent_shape), sigmas[START].expand(len(part)))
        steps = trajectory(denoiser, noised, sigmas, own.step_noise(policy.latent_shape), first=START)
        images = policy.decode(end_of(noised, steps))
        for name, reward in rewards.items():
            scores[name].append(reward(images, part))
    shares: dict[str, float] = {}
    for name, parts in scores.items():
        table = torch.cat(parts).double().reshape(len(prompts), prefixes, completions)
        within = table.var(2).mean()
        between = table.mean(2).var(1).mean() - within / completions
        shares[name] = float(within / (within + between.clamp(min=0)))
    return shares


@torch.no_grad()
def measure(n: int = 1000) -> dict[str, Any]:
    """Every gate's figure."""
    policy, reader = experiment.load_base(), files.load_reader()
    captions = world.captions(n, "gates")
    texts = [c.text for c in captions]
    settings = experiment.generation(11)
    base = {"": cfg(settings.base)}
    samples = generate(policy, texts, settings, base)[""]

    few, each = captions[:40], 8
    repeated = [c.text for c in few for _ in range(each)]
    drawn, real = generate(policy, repeated, settings, base)[""], world.real_renders(few, each, 3)
    groups = torch.arange(len(few)).repeat_interleave(each)
    features = [torch.cat([reader.features(p) for p in x.split(64)]) for x in (drawn, real)]
    diversity = [float(within_prompt_diversity(f, groups).mean()) for f in features]

    towers = {name: files.load_reward(name, standardise=False) for name in ("proxy", "heldout")}
    asked = [c.text for c in captions[:JUDGED] for _ in range(each)]
    judged = generate(policy, asked, settings, base)[""]
    scores = {n: torch.cat([r(judged[i : i + 64], asked[i : i + 64]) for i in range(0, len(asked), 64)]) for n, r in towers.items()}
    return {
        "autoencoder": reconstruction(policy, reader, captions),
        "base": read_back(reader, samples, captions),
        "diversity": {"base": diversity[0], "renders": diversity[1], "ratio": diversity[0] / diversity[1]},
        "decided_after_switch": decided_after_the_switch(policy, texts[:16], 4, 4),
        "rewards": reward_gates(scores, judged, asked, Gold(reader)),
        "extractor": extractor_gates(files.load_extractor().features, few),
        "reader": extractor_gates(reader.features, few),
        "prompts": n,
    }


def report(found: dict[str, Any]) -> str:
    """Every gate as a row of Markdown: what was measured, what was wanted, and whether it was met."""
    rewards, rows = found["rewards"], list[tuple[str, float, float, float]]()
    rows += [
        ("autoencoder, dB", found["autoencoder"]["psnr"], 28, math.inf),
        ("attributes read back from reconstructions, jointly", found["autoencoder"]["rebuilt"]["joint"], 0.98, 1),
        ("attributes read back from base samples, jointly", found["base"]["joint"], 0.90, 1),
        ("diversity of the base, share of the renders'", found["diversity"]["ratio"], 0.80, math.inf),
    ]
    rows += [(f"decided after the switch: {name}", share, 0.15, 0.85) for name, share in found["decided_after_switch"].items()]
    rows.append(("proxy's agreement with the rater", rewards["proxy"]["agreement with the rater"], 0.70, 0.85))
    for name in ("proxy", "heldout"):
        rows.append((f"{name}: correlation with gold", rewards[name]["correlation with gold"], 0.65, 1))
        rows.append((f"{name}: Bradley–Terry loss above Bayes", rewards[name]["above Bayes"], -math.inf, 0.03))
    for part, value in rewards["heldout"]["parts"].items():
        own, alone = rewards["gold itself"][part], rewards["heldout"]["alone"][part]
        rows.append((f"heldout sees {part} (alone {alone:.2f}; the utility itself {own:.2f})", value, 0.20, 1))
    rows += [
        ("extractor: diversity of renders of one finish", found["extractor"]["finish"], 0.95, math.inf),
        ("extractor: diversity of renders of one layout", found["extractor"]["layout"], 0, 0.60),
    ]
    out = ["| gate | measured | wanted | |", "|---|---|---|---|"]
    for name, value, low, high in rows:
        wanted = f"≥ {low:g}" if high in (1, math.inf) else f"≤ {high:g}" if low in (0, -math.inf) else f"{low:g} to {high:g}"
        out.append(f"| {name} | {value:.3g} | {wanted} | {'met' if low <= value <= high else '**missed**'} |")
    return "\n".join(out) + f"\n\nA crowd's utility and gold correlate within a prompt by {rewards['crowd–gold']:.2f}.\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the gates of docs/embedded-world.md")
    parser.add_argument("out", type=Path, nargs="?", help="JSON file (default: the terminal alone)")
    out = parser.parse_args().out
    text = json.dumps(measure(), indent=1, ensure_ascii=False) + "\n"
    if out:
        out.write_text(text, "utf-8")
    sys.stdout.write(report(json.loads(text)))
