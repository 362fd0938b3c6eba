"""One gradient step for each sample, or one for each micro-batch, drawn by turns: variance of the gradient, and what equal time buys.

    python -m tools.embedded.strata FOLDER [--seconds 60] [--seeds 31 32 33]

Micro-batches of 4, four to an optimizer step, as on a GPU that holds no more. Variance is that of a micro-batch's loss and of its gradient,
at a fixed LoRA. Runs are stopped by processor time, and judged by combined generation on prompts of their own. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from trainer.config import build
from trainer.data.samples import Samples
from trainer.demo import experiment, files, world
from trainer.objectives import OBJECTIVES, RunContext
from trainer.policy import Lora
from trainer.training.evaluation import Evaluation
from trainer.training.parts import Parts, weights_of
from trainer.training.run import Run

MICRO, ACCUMULATE, RATE, PROMPTS, DRAWN = 4, 4, 4e-3, 24, 32
WAYS: dict[str, dict[str, Any]] = {
    "per sample": {},
    "per micro-batch": {"per_sample": False},
    "per micro-batch, stratified": {"per_sample": False, "stratified": True},
    "stratified, 2 steps a rollout": {"per_sample": False, "stratified": True, "grad_steps": 2},
}


TRAINED = ("per sample", "per micro-batch, stratified")


def variance(method: str, samples: Samples) -> list[str]:
    """Rows of the first table."""
    policy, rows = experiment.load_base(), list[str]()
    policy.add_lora(Lora(), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    settings = {"steps": experiment.STEPS, **experiment.OBJECTIVES[method]}
    for way, more in WAYS.items():
        loss_of = build(OBJECTIVES[method], {**settings, **more}).begin(RunContext(policy, files.load_reward("proxy")))
        losses, gradients, seconds = list[float](), list[torch.Tensor](), list[float]()
        for number in range(DRAWN):
            for p in policy.parameters():
                p.grad = None
            begin = time.process_time()
            loss, _ = loss_of(samples.batch(7, number, number, MICRO))
            loss.backward()
            seconds.append(time.process_time() - begin)
            losses.append(float(loss.detach()))
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        stacked = torch.stack(gradients)
        spread = float((stacked - stacked.mean(0)).square().sum() / (DRAWN - 1))
        each = fmean(seconds)
        rows.append(f"| {method} | {way} | {each:.3f} | {stdev(losses):.3f} | {spread:.4g} | {spread * each:.4g} |")
    return rows


def trained(folder: Path, method: str, way: str, seed: int, seconds: float, samples: Samples) -> dict[str, float]:
    """The last evaluation of a run of so much processor time, and its number of steps."""
    objective = {**experiment.OBJECTIVES[method], **WAYS[way]}
    size: dict[str, Any] = {"batch_size": MICRO, "gradient_accumulation_steps": ACCUMULATE, "seed": seed, "steps": 100_000}
    config = experiment.train_config(
        folder / f"{method}-{way}-{seed}".replace(" ", "-"), method, objective, RATE, every=1, watched=PROMPTS, **size
    )
    prompts = [c.text for c in world.captions(PROMPTS, "draws")]
    policy, rewards = experiment.load_base(), experiment.rewards()
    evaluation = Evaluation.of_run(config, policy, rewards, prompts, files.load_extractor().features)
    silent = replace(config, watch=replace(config.watch, every=0), save_every=100_000)
    run = Run.start(silent, Parts(policy, samples, files.load_reward("proxy"), weights=weights_of(silent)), overwrite=True)
    begin, step = time.process_time(), 0
    for done in run.steps():
        step = done.number
        if time.process_time() - begin >= seconds:
            break
    return {"steps": step, **{name: value for name, value in evaluation.run(step).items() if name != "step"}}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description="How gradient steps are drawn: variance, and equal time")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    a = parser.parse_args()
    torch.set_num_threads(1)
    samples = experiment.renders(256, a.seeds[0])
    print("| method | draws | s per micro-batch | s.d. of the loss | variance of the gradient | times s |\n|---|---|---|---|---|---|")
    for method in ("refl", "imagerefl"):
        print("\n".join(variance(method, samples)), flush=True)
    print(f"\n| method | draws | steps in {a.seconds:g} s | proxy | held-out | gold | diversity |\n|---|---|---|---|---|---|---|")
    for method in ("refl", "imagerefl"):
        for way in TRAINED:
            found = [trained(a.folder, method, way, seed, a.seconds, samples) for seed in a.seeds]
            cells = [" / ".join(f"{one[name]:.2f}" for one in found) for name in ("reward", "heldout", "gold", "diversity")]
            print(f"| {method} | {way} | {' / '.join(str(int(one['steps'])) for one in found)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
