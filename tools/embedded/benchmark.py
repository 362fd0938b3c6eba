"""Seconds, memory and arithmetic of a training step, each saving off and on: python -m tools.embedded.benchmark docs/benchmarks.md

Times are pairs taken in turn in one run, and only their ratios mean anything elsewhere. Memory is the largest resident
size of a fresh process over what it held before its first step.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.batches import Images
from trainer.data.samples import encode_images
from trainer.demo import files, world
from trainer.demo.experiment import START, STEPS
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.models.unet import UNetPolicy
from trainer.objectives import ImageReFL, ReFL, RunContext
from trainer.objectives.reward_gradient.shared import Sampler
from trainer.policy import Lora
from trainer.rewards.base import RewardModel
from trainer.rewards.two_tower import TwoTower
from trainer.rewards.weighted import Standardised
from trainer.rng import Rng
from trainer.training.optimizers import Name as OptimizerName
from trainer.training.optimizers import build_optimizer

IMAGE = ImageReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1, start_from=START, start_to=START, refl_share=0.0)
NOISE = ReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1)


class SeparateForwards(ImageReFL):
    """ImageReFL with the start evaluated twice, once for each loss, as the official code does."""

    def _from_start(self, sampler: Sampler, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        x = sampler.rollout(start, last, first)
        return x, sampler.denoiser(x, sampler.sigmas[last])


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of taking a step."""

    objective: Any = IMAGE
    batch: int = 16
    denoiser: bool = False
    decoder: bool = False
    reward: bool = False
    slices: bool = False
    merges: bool = False
    cache_texts: bool = True
    cache_latents: bool = True
    plain_attention: bool = False
    channels_last: bool = False
    compiled: bool = False
    reward_dtype: torch.dtype = torch.float32
    optimizer: OptimizerName = "adamw"


@dataclasses.dataclass
class Stepper:
    """Takes training steps of a case on one set of models; `rewards` loads the reward in a type of weights."""

    policy: DiffusersPolicy
    images: Tensor  # (N,3,H,W)
    captions: Sequence[str]
    rewards: Callable[[torch.dtype], RewardModel]

    def __post_init__(self) -> None:
        self.samples = encode_images(self.policy, self.images, self.captions)
        self.policy.add_lora(Lora())
        self.processors = {module: module.attn_processors for module in (self.policy.network, self.policy.vae)}
        self.compiled: dict[nn.Module, Any] = {}
        self.reward = lru_cache(1)(self.rewards)
        self.optimizer = lru_cache(1)(lambda name: build_optimizer(name, self.policy.parameters(), 1e-5, 0.0))

    def prepare(self, case: Case) -> None:
        """Bring the models into the case's state."""
        policy = self.policy
        policy.gradient_checkpointing(denoiser=case.denoiser, vae=case.decoder)
        policy.merge_rollouts, policy.autoencoder.slicing = case.merges, case.slices
        for module, own in self.processors.items():
            module.set_attn_processor(AttnProcessor() if case.plain_attention else dict(own))
            module.to(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
        if case.compiled and not self.compiled:
            policy.compile()
            calls = ((m, getattr(m, "_compiled_call_impl")) for m in policy.network.modules())  # noqa: B009
            self.compiled = {module: call for module, call in calls if call is not None}
        for module, call in self.compiled.items():
            setattr(module, "_compiled_call_impl", call if case.compiled else None)  # noqa: B010
        tower = _bare(self.reward(case.reward_dtype))
        if isinstance(tower, TwoTower):
            tower.gradient_checkpointing(case.reward)
            if not case.cache_texts:
                policy.prompts.clear()
                tower.forget()

    def __call__(self, case: Case, number: int = 0) -> Time:
        """The time of one optimizer step; `number` decides its draws, and with them how long the rollouts are."""
        self.prepare(case)
        optimizer, reward = self.optimizer(case.optimizer), self.reward(case.reward_dtype)
        wait(self.policy.device)
        begin = Time.now()
        samples = self.samples
        if not case.cache_latents:
            rows = torch.arange(case.batch) % len(self.images)
            samples = encode_images(self.policy, self.images[rows], [self.captions[int(r)] for r in rows])
        batch = dataclasses.replace(samples.batch(0, number, number, case.batch), number=0)
        optimizer.zero_grad()
        case.objective.begin(RunContext(self.policy, reward))(batch)[0].backward()
        optimizer.step()
        wait(self.policy.device)
        now = Time.now()
        return Time(now.clock - begin.clock, now.work - begin.work)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds by the clock, and of this process on a processor, which other programs do not lengthen much."""

    clock: float
    work: float

    @staticmethod
    def now() -> Time:
        """Both, from an unknown beginning."""
        return Time(time.perf_counter(), time.process_time())


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two cases taken in turn: median seconds by the clock of each, and medians of their ratios."""

    off: float
    on: float
    clock: float
    work: float


def pair(stepper: Stepper, off: Case, on: Case, rounds: int = 3) -> Pair:
    """Both once to warm up, then in turn, each round with the same draws."""
    for case in (off, on):
        stepper(case)
    times = [(stepper(off, number), stepper(on, number)) for number in range(rounds)]
    median = statistics.median
    clocks, works = [b.clock / a.clock for a, b in times], [b.work / a.work for a, b in times]
    return Pair(median(a.clock for a, _ in times), median(b.clock for _, b in times), median(clocks), median(works))


def wait(device: torch.device) -> None:
    """Until what was asked of an accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bare(reward: RewardModel) -> RewardModel:
    return reward.reward if isinstance(reward, Standardised) else reward


def embedded() -> Stepper:
    """The embedded model, its renders, and the reward it is trained with."""

    def reward(dtype: torch.dtype) -> RewardModel:
        tower = files.load_tower("proxy", dtype=dtype)
        return Standardised(tower, *tower.statistics) if tower.statistics else tower

    return Stepper(UNetPolicy.load(files.PIPELINE), *world.real_images(64, 0), reward)


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


def savings(base: Case, plain: Any, noise: Any) -> list[tuple[str, Case, Case]]:
    """Everything that saves time or memory: its name, a case without it and one with it.

    `plain` is the objective of `base` with separate forwards, `noise` a whole rollout without gradient.
    """
    replace = dataclasses.replace
    rollouts = replace(base, objective=noise)
    return [
        ("first rollout step shares the diffusion loss's forward", replace(base, objective=plain), base),
        ("`merge_rollouts`, ImageReFL", base, replace(base, merges=True)),
        ("`merge_rollouts`, ReFL (all rollouts from noise)", rollouts, replace(rollouts, merges=True)),
        ("prompts encoded once", replace(base, cache_texts=False), base),
        ("images encoded once", replace(base, cache_latents=False), base),
        ("torch's fused attention (always on)", replace(base, plain_attention=True), base),
        ("`channels_last`", base, replace(base, channels_last=True)),
        ("`compile`", base, replace(base, compiled=True)),
        ("`vae_slicing`", base, replace(base, slices=True)),
        ("`reward_dtype` bfloat16", base, replace(base, reward_dtype=torch.bfloat16)),
        ("`optimizer` adamw-fused", base, replace(base, optimizer="adamw-fused")),
        ("`gradient_checkpointing_denoiser`", base, replace(base, denoiser=True)),
        ("`gradient_checkpointing_vae`", base, replace(base, decoder=True)),
        ("`gradient_checkpointing_reward`", base, replace(base, reward=True)),
        ("all three checkpoints", base, replace(base, denoiser=True, decoder=True, reward=True)),
        ("all three checkpoints and `vae_slicing`", base, replace(base, denoiser=True, decoder=True, reward=True, slices=True)),
    ]


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
    for name, off, on in savings(replace(base, batch=4), separate, NOISE):
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
    torch.set_num_threads(1)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        sys.stderr.write(line + "\n")

    measure(tell)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(lines) + "\n", "utf-8")
