"""Seconds, memory and arithmetic of a training step, each saving off and on: python -m trainer.demo.benchmark docs/benchmarks.md

Times are pairs taken in turn in one run, and only their ratios mean anything elsewhere. Memory is the largest resident
size of a fresh process over what it held before its first step.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..data import encode_images
from ..draws import Draws
from ..objectives import ImageReFL, ReFL
from ..objectives.base import roll
from ..policies.unet import UNetPolicy
from ..policy import Batch, Lora, Policy
from ..reward import Standardised
from ..rewards.two_tower import TwoTower
from . import files, show
from .show import START, STEPS

IMAGE = ImageReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1, start_from=START, start_to=START, refl_share=0.0)
NOISE = ReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1)


class SeparateForwards(ImageReFL):
    """ImageReFL with the start evaluated twice, once for each loss, as the official code does."""

    def _from_start(
        self, policy: Policy, batch: Batch, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = roll(policy, batch, start.detach(), first, last, sigmas, self.guidance, self.eta)
        return x, policy.denoiser(batch.prompts, self.guidance)(x, sigmas[last])


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of taking a step."""

    objective: Any = IMAGE
    batch: int = 16
    denoiser: bool = False
    decoder: bool = False
    reward: bool = False
    cache_texts: bool = True
    cache_latents: bool = True


class Stepper:
    """Takes training steps of a case; knows the models once."""

    def __init__(self) -> None:
        self.policy = UNetPolicy.load(files.PIPELINE)
        self.images, self.captions = show.real_images(64, 0)
        self.samples = encode_images(self.policy, self.images, self.captions)
        self.policy.add_lora(Lora())
        self.reward = files.load_reward("proxy")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)
        self.number = 0

    def __call__(self, case: Case) -> float:
        """Seconds of one optimizer step."""
        assert isinstance(self.reward, Standardised) and isinstance(self.reward.reward, TwoTower)
        self.policy.checkpoint_gradients(denoiser=case.denoiser, decoder=case.decoder)
        self.reward.reward.checkpoint_gradients(case.reward)
        if not case.cache_texts:
            self.policy._embeddings.clear()  # pyright: ignore[reportPrivateUsage]
            self.reward.reward._texts.clear()  # pyright: ignore[reportPrivateUsage]
        begin = time.perf_counter()
        samples = self.samples
        if not case.cache_latents:
            rows = torch.arange(case.batch) % len(self.images)
            samples = encode_images(self.policy, self.images[rows], [self.captions[r] for r in rows.tolist()])
        batch = dataclasses.replace(samples.batch(0, self.number, self.number, case.batch), number=0)
        self.optimizer.zero_grad()
        case.objective(self.policy, batch, self.reward)[0].backward()
        self.optimizer.step()
        self.number += 1
        return time.perf_counter() - begin


def _memory(field: str) -> float:
    """A field of Linux's /proc/self/status in megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _peak(case: Case, pipe: Any) -> None:
    stepper = Stepper()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading: VmHWM starts again from what is resident now
    before = _memory("VmRSS:")
    for _ in range(2):
        stepper(case)
    pipe.send(_memory("VmHWM:") - before)


def peak_mb(case: Case) -> float:
    """Megabytes that training steps of a case add to a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(case, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def pair(stepper: Stepper, a: Case, b: Case, rounds: int = 3) -> tuple[float, float, float]:
    """Median seconds of a and b, and the median of their ratio b/a, taken in turn."""
    for case in (a, b):
        stepper(case)
    times = [(stepper(a), stepper(b)) for _ in range(rounds)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times), statistics.median(y / x for x, y in times)


def _brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.flatten(1).mean(1)


def forward_equivalents(objective: ImageReFL, batches: int = 12, size: int = 8) -> dict[str, float]:
    """Cost of the image branch per image in denoiser forwards: a gradient call counted as 3, and by measured FLOPs with the LoRA."""
    policy = UNetPolicy.load(files.PIPELINE)
    policy.add_lora(Lora())
    policy.decode = lambda latents: latents  # the denoiser's cost alone
    calls = {"plain": 0, "gradient": 0}
    policy.unet.register_forward_hook(lambda _m, inputs, _o: calls.__setitem__(_kind(), calls[_kind()] + len(inputs[0])))
    latents = torch.randn(size, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ("a red star",) * size
    policy.embed(prompts)
    with FlopCounterMode(display=False) as single, torch.no_grad():
        policy.denoiser(prompts)(latents, policy.sigmas(40)[30].expand(size))
    calls.update(plain=0, gradient=0)
    flops = 0
    _brightness.differentiable = True  # type: ignore[attr-defined]
    for number in range(batches):
        batch = Batch(prompts, Draws(number, 0, tuple(range(size))), 0, latents)
        with FlopCounterMode(display=False) as counter:
            objective(policy, batch, _brightness)[0].backward()  # type: ignore[arg-type]
        flops += counter.get_total_flops()
    counted = (calls["plain"] + 3 * calls["gradient"]) / (batches * size)
    return {"counted": counted, "flops": flops / batches / single.get_total_flops()}


def _kind() -> str:
    return "gradient" if torch.is_grad_enabled() else "plain"


def measure(say: Callable[[str], object]) -> None:
    """Write every table as Markdown, line by line."""
    stepper = Stepper()
    base = Case()
    say("# Benchmarks\n")
    say("Made by `make benchmark` on the embedded model, one CPU thread, fp32, batch 16, 20 sampler steps. Ratios are the medians of pairs")
    say("taken in turn; memory is what two training steps add to a fresh process. Elsewhere the ratios hold better.\n")
    say("## Each saving off and on (ImageReFL, image branch)\n")
    say("| saving | off, s/step | on, s/step | on/off | memory off, MB | memory on, MB |\n|---|---|---|---|---|---|")
    replace = dataclasses.replace
    shared = {f.name: getattr(IMAGE, f.name) for f in dataclasses.fields(IMAGE)}
    rows = [
        ("first rollout step shares the diffusion loss's forward", replace(base, objective=SeparateForwards(**shared)), base),
        ("text embeddings cached", replace(base, cache_texts=False), base),
        ("autoencoder moments cached", replace(base, cache_latents=False), base),
        ("gradient checkpointing, denoiser", base, replace(base, denoiser=True)),
        ("gradient checkpointing, decoder", base, replace(base, decoder=True)),
        ("gradient checkpointing, reward", base, replace(base, reward=True)),
        ("all three checkpoints", base, replace(base, denoiser=True, decoder=True, reward=True)),
    ]
    for name, off, on in rows:
        a, b, ratio = pair(stepper, off, on)
        say(f"| {name} | {a:.2f} | {b:.2f} | {ratio:.2f} | {peak_mb(off):.0f} | {peak_mb(on):.0f} |")
    say("\n## ReFL beside ImageReFL, and growth with the batch\n")
    say("| batch | ReFL, s/step | ImageReFL image branch, s/step | ImageReFL/ReFL | ReFL, MB | ImageReFL, MB |\n|---|---|---|---|---|---|")
    for size in (4, 16):
        noise, image = replace(base, objective=NOISE, batch=size), replace(base, batch=size)
        a, b, ratio = pair(stepper, noise, image, 3)
        say(f"| {size} | {a:.2f} | {b:.2f} | {ratio:.2f} | {peak_mb(noise):.0f} | {peak_mb(image):.0f} |")
    say("\n## Growth with the sampler steps (batch 16; start and gradient range at the same noise levels)\n")
    say("| steps | ReFL, s/step | ImageReFL image branch, s/step | ImageReFL/ReFL |\n|---|---|---|---|")
    for steps in (10, 20, 40):
        start = steps * START // STEPS
        refl = ReFL(steps=steps, grad_from=start, grad_to=steps - 1)
        image = ImageReFL(steps=steps, grad_from=start, grad_to=steps - 1, start_from=start, start_to=start, refl_share=0.0)
        a, b, ratio = pair(stepper, replace(base, objective=refl), replace(base, objective=image), 3)
        say(f"| {steps} | {a:.2f} | {b:.2f} | {ratio:.2f} |")
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
    torch.set_num_threads(1)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        sys.stderr.write(line + "\n")

    measure(tell)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(lines) + "\n", "utf-8")
