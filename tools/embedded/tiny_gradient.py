"""What reward gradients through the tiny decoder cost and give on the embedded model: python -m tools.embedded.tiny_gradient

Cosine of the LoRA's gradient to the whole decoder's, time and memory of a step, and the held-out gain at equal processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.commands.parts import load_parts, place_parts
from trainer.config import build, read_toml
from trainer.generate import Generation, generate
from trainer.guidance import combined
from trainer.objectives import RunContext
from trainer.rewards.registry import load_reward
from trainer.runtime.processes import ALONE
from trainer.training.config import TrainConfig
from trainer.training.run import Run

from .benchmark import peak_mb
from .stepper import IMAGE, Case, Stepper, embedded, pair

PRESET = Path(__file__).parents[2] / "presets" / "imagerefl-demo.toml"
HELD_OUT = ("demo-heldout", "demo-gold")


def gradient(stepper: Stepper, case: Case, number: int) -> Tensor:
    """The LoRA's gradient, flat, of one micro-batch by the reward alone; `number` decides its draws."""
    stepper.prepare(case)
    policy = stepper.policy
    for parameter in policy.parameters():
        parameter.grad = None
    loss, _ = case.objective.begin(RunContext(policy, stepper.reward(torch.float32)))(stepper.samples.batch(0, number, number, case.batch))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def cosines(stepper: Stepper, batches: int) -> tuple[list[float], float]:
    """Of each micro-batch's gradients with and without the tiny decoder, and of their sums."""
    whole = Case(objective=dataclasses.replace(IMAGE, diffusion_weight=0.0))
    pairs = [(gradient(stepper, whole, n), gradient(stepper, dataclasses.replace(whole, tiny=True), n)) for n in range(batches)]
    one = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    sums = [torch.stack(side).sum(0) for side in zip(*pairs)]
    return one, float(F.cosine_similarity(sums[0], sums[1], dim=0))


class Timed:
    """A run whose steps are taken one by one, and the processor time that they took."""

    def __init__(self, folder: Path, seed: int, **more: Any) -> None:
        config = build(
            TrainConfig,
            {
                **read_toml(PRESET),
                "out": str(folder),
                "seed": seed,
                "steps": 1000,
                "save_every": 1000,
                "cache": str(folder.parent / "cache"),
                **more,
            },
        )
        parts = load_parts(config, "cpu", ALONE)
        place_parts(config, parts, "cpu")
        self.run = Run.start(config, parts, overwrite=True)
        self.steps, self.seconds, self.number = self.run.steps(), 0.0, 0

    def step(self) -> None:
        """One optimizer step."""
        begin = time.process_time()
        next(self.steps)
        self.seconds, self.number = self.seconds + time.process_time() - begin, self.number + 1

    def scores(self, prompts: list[str], adapter: str) -> dict[str, float]:
        """Mean held-out rewards of one image per prompt, drawn by the tuned model alone or by the base."""
        settings = Generation(self.run.config.method.steps, guidance_scale=1.0, tuned_guidance_scale=1.0, seed=99)
        mix = combined(settings.base, settings.tuned(), 0 if adapter == "tuned" else settings.steps)
        images = generate(self.run.policy, prompts, settings, {"": mix})[""]
        return {name: float(load_reward(name, True)(images, prompts).mean()) for name in ("demo-proxy", *HELD_OUT)}


def equal_time(seed: int, steps: int, say: Callable[[str], object]) -> None:
    """One run through each decoder, in turn; gains where both have taken the time of half and of all `steps` of the whole decoder's."""
    with tempfile.TemporaryDirectory() as folder:
        whole, tiny = Timed(Path(folder) / "whole", seed), Timed(Path(folder) / "tiny", seed, gradient_vae="demo")
        prompts = [str(p) for p in dict.fromkeys(whole.run.samples.prompts)][:64]
        base = whole.scores(prompts, "base")
        for _ in range(2):
            for _ in range(steps // 2):
                whole.step()
                while tiny.seconds < whole.seconds:
                    tiny.step()
            for name, run in (("whole", whole), ("tiny", tiny)):
                gains = " | ".join(f"{value - base[key]:+.2f}" for key, value in run.scores(prompts, "tuned").items())
                say(f"| {seed} | {name} | {run.number} | {run.seconds:.0f} | {gains} |")


def gradients(batches: int, say: Callable[[str], object]) -> None:
    """Cosine of the gradients, and time and memory of a step."""
    stepper = embedded()
    with torch.no_grad():  # an adapter that is somewhere: at first one half of it is zero
        for parameter in stepper.policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    one, summed = cosines(stepper, batches)
    say(f"cosine of the LoRA's gradient, {batches} micro-batches of 16: median {statistics.median(one):.3f}, "
        f"{min(one):.3f} to {max(one):.3f}; of their sum {summed:.3f}")  # fmt: skip
    for batch in (4, 16):
        off, on = Case(batch=batch), Case(batch=batch, tiny=True)
        times = pair(stepper, off, on, 7)
        say(f"batch {batch}: tiny/whole {times.work:.2f} of the processor time, {peak_mb(off):.0f} MB and {peak_mb(on):.0f} MB")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Measure reward gradients through the tiny decoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--gains", action="store_true", help="the gains alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = lambda line: print(line, flush=True)  # noqa: E731
    if not args.gains:
        gradients(args.batches, say)
    say("| seed | decoder | steps | processor s | training reward | held-out | gold |\n|---|---|---|---|---|---|---|")
    for seed in range(args.seeds):
        equal_time(seed, args.steps, say)


if __name__ == "__main__":
    main()
