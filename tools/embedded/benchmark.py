"""Seconds, memory and arithmetic of a training step, each saving off and on: python -m tools.embedded.benchmark docs/benchmarks.md

Times are pairs taken in turn in one run, and only their ratios mean anything elsewhere. Memory is the largest resident
size of a fresh process over what it held before its first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.batches import Images
from trainer.demo import files
from trainer.demo.experiment import START, STEPS
from trainer.models.unet import UNetPolicy
from trainer.objectives import ImageReFL, ReFL, RunContext
from trainer.policy import Lora
from trainer.rewards.base import RewardModel
from trainer.rng import Rng

from .stepper import IMAGE, NOISE, Case, SeparateForwards, embedded, pair, savings


def _memory(field: str) -> float:
    """A field of Linux's /proc/self/status in megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _peak(case: Case, pipe: Any) -> None:
    torch.set_num_threads(1)
    stepper = embedded()
    stepper.prepare(case)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading: VmHWM starts again from what is resident now
    before = _memory("VmRSS:")
    for number in range(2):
        stepper(case, number)
    pipe.send(_memory("VmHWM:") - before)


@lru_cache
def peak_mb(case: Case) -> float:
    """Megabytes that training steps of a case add to a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(case, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def _brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.flatten(1).mean(1)


def forward_equivalents(objective: ImageReFL, batches: int = 12, size: int = 8) -> dict[str, float]:
    """Cost of the image branch per image in denoiser forwards: a gradient call counted as 3, and by measured FLOPs with the LoRA."""
    policy = UNetPolicy.load(files.PIPELINE)
    policy.add_lora(Lora())
    policy.decode = lambda latents: latents  # the denoiser's cost alone
    calls = {"plain": 0, "gradient": 0}
    policy.network.register_forward_hook(lambda _m, inputs, _o: calls.__setitem__(_kind(), calls[_kind()] + len(inputs[0])))
    latents = torch.randn(size, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ("a red star",) * size
    policy.prompts.prepare(prompts)
    with FlopCounterMode(display=False) as single, torch.no_grad():
        policy.denoiser(prompts)(latents, policy.sigmas(40)[30].expand(size))
    calls.update(plain=0, gradient=0)
    flops = 0
    _brightness.differentiable = True  # type: ignore[attr-defined]
    for number in range(batches):
        batch = Images(prompts, Rng(number, 0, tuple(range(size))), 0, latents)
        with FlopCounterMode(display=False) as counter:
            objective.begin(RunContext(policy, _brightness))(batch)[0].backward()  # type: ignore[arg-type]
        flops += counter.get_total_flops()
    counted = (calls["plain"] + 3 * calls["gradient"]) / (batches * size)
    return {"counted": counted, "flops": flops / batches / single.get_total_flops()}


def _kind() -> str:
    return "gradient" if torch.is_grad_enabled() else "plain"


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What bfloat16 does to a reward: largest and typical change of a score in standard deviations, cosine of pixel gradients."""

    worst: float
    typical: float
    cosine: float


def rounded(reward: Callable[[torch.dtype], RewardModel], images: Tensor, prompts: Sequence[str], std: float | None = None) -> Rounded:
    """Compare a reward in both types on images (B,3,H,W). Without `std` the unit is that of these images' scores."""
    scores, pulls = list[Tensor](), list[Tensor]()
    for dtype in (torch.float32, torch.bfloat16):
        x = images.clone().requires_grad_()
        scores.append(reward(dtype)(x, prompts))
        pulls.append(torch.autograd.grad(scores[-1].sum(), x)[0].flatten(1))
    change = (scores[1] - scores[0]).detach() / (std or float(scores[0].std()))
    cosine = torch.nn.functional.cosine_similarity(pulls[0], pulls[1], dim=1).mean()
    return Rounded(float(change.abs().max()), float(change.square().mean().sqrt()), float(cosine))


def measure(say: Callable[[str], object]) -> None:
    """Write every table as Markdown, line by line."""
    stepper = embedded()
    base = Case()
    replace = dataclasses.replace
    say("# Benchmarks\n")
    say("Made by `make benchmark` on the embedded model, one CPU thread, fp32, 20 sampler steps. Ratios are the medians of pairs")
    say("taken in turn in one run, by the clock and by the time this process had a processor; memory is what two training steps add to a")
    say("fresh process. Elsewhere the ratios hold better than the seconds. On a GPU, at published sizes: `make bench-gpu`.\n")
    say("## Each saving off and on (ImageReFL, image branch, batch 4)\n")
    say("| saving | off, s/step | on, s/step | on/off, clock | on/off, processor | memory off, MB | memory on, MB |")
    say("|---|---|---|---|---|---|---|")
    separate = SeparateForwards(**{f.name: getattr(IMAGE, f.name) for f in dataclasses.fields(IMAGE)})
    four = replace(base, batch=4)
    for name, off, on in (*savings(four, separate, NOISE), ("`gradient_vae`", four, replace(four, tiny=True))):
        p = pair(stepper, off, on)
        say(f"| {name} | {p.off:.2f} | {p.on:.2f} | {p.clock:.2f} | {p.work:.2f} | {peak_mb(off):.0f} | {peak_mb(on):.0f} |")
    parked = sum(q.numel() * q.element_size() for m in stepper.policy.encoders() for q in m.parameters()) / 2**20
    say(f"\n`offload_encoders` takes {parked:.1f} MB of weights off an accelerator here; on a CPU there is nowhere to put them.")
    say("\n## A reward in bfloat16\n")
    say("| reward, 32 renders | typical change of a score, std | largest | cosine of pixel gradients |\n|---|---|---|---|")
    for name in ("proxy", "heldout"):
        r = rounded(
            lambda dtype, name=name: files.load_tower(name, dtype=dtype),
            stepper.images[:32],
            stepper.captions[:32],
            (files.load_tower(name).statistics or (0.0, 1.0))[1],
        )
        say(f"| demo-{name} | {r.typical:.4f} | {r.worst:.4f} | {r.cosine:.4f} |")
    say("\n## ReFL beside ImageReFL, and growth with the batch\n")
    say("| batch | ReFL, s/step | ImageReFL image branch, s/step | ImageReFL/ReFL, processor | ReFL, MB | ImageReFL, MB |")
    say("|---|---|---|---|---|---|")
    for size in (4, 16):
        noise, image = replace(base, objective=NOISE, batch=size), replace(base, batch=size)
        p = pair(stepper, noise, image)
        say(f"| {size} | {p.off:.2f} | {p.on:.2f} | {p.work:.2f} | {peak_mb(noise):.0f} | {peak_mb(image):.0f} |")
    say("\n## Growth with the sampler steps (batch 16; start and gradient range at the same noise levels)\n")
    say("| steps | ReFL, s/step | ImageReFL image branch, s/step | ImageReFL/ReFL, processor |\n|---|---|---|---|")
    for steps in (10, 20, 40):
        start = steps * START // STEPS
        refl = ReFL(steps=steps, grad_from=start, grad_to=steps - 1)
        image = ImageReFL(steps=steps, grad_from=start, grad_to=steps - 1, start_from=start, start_to=start, refl_share=0.0)
        p = pair(stepper, replace(base, objective=refl), replace(base, objective=image))
        say(f"| {steps} | {p.off:.2f} | {p.on:.2f} | {p.work:.2f} |")
    say("\n## Denoiser cost per image at the official setting (40 steps, start 30, m uniform in 30–39)\n")
    official = ImageReFL(refl_share=0.0)
    both = {f.name: getattr(official, f.name) for f in dataclasses.fields(official)}
    ours, theirs = forward_equivalents(official), forward_equivalents(SeparateForwards(**both))
    refl = 34.5 + 3
    say("| | forwards, a gradient call counted as 3 | by measured FLOPs with the LoRA |\n|---|---|---|")
    say(f"| shared forward (ours) | {ours['counted']:.2f} | {ours['flops']:.2f} |")
    say(f"| separate forwards | {theirs['counted']:.2f} | {theirs['flops']:.2f} |")
    say("\nThe expected figure of ours is 9.3; the official code takes 10.6, because it also takes a spurious step where m is the start.")
    share = 0.25
    say(
        f"With a quarter of plain ReFL micro-batches ({refl:.1f} forwards an image) "
        f"an ImageReFL image costs {(1 - share) * 9.3 + share * refl:.1f} on average."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the benchmarks of the embedded model")
    parser.add_argument("out", type=Path, nargs="?", help="Markdown file (default: the terminal alone)")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        sys.stderr.write(line + "\n")

    measure(say)
    if out:
        out.write_text("\n".join(lines) + "\n", "utf-8")
