"""SQDF: the soft Q-function's gradient through one reparameterised transition, off-policy, with a closed-form KL.

The transition starts from a stored state, so nothing is differentiated but one step; what follows it is a frozen estimate
of x0, by the base model or by a consistency adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...data.batches import Batch
from ...denoiser import per_sample
from ...policy import Policy
from ...rng import Rng
from ...runtime.files import free_bytes
from ...sampling import Space, step, trajectory
from ..base import Logs, Loss, Objective, RunContext
from ..shared import sampler_steps, snr, training_guidance_scale, weight_of_reward
from .replay import Replay, Sampling, trajectory_bytes

Estimator = Literal["base", "consistency"]


@dataclass(frozen=True)
class SQDF(Objective):
    """Soft-Q diffusion fine-tuning (Kang et al. 2025, arXiv:2512.04559): −γ^(T−1−i)·r(f(x_{i+1})) + α·KL for one transition i.

    x_{i+1} = μ_θ(x_i) + s·ε is one ancestral step of the tuned model, f a frozen estimate of x0 from it. x_i comes from a
    replay buffer of the model's own rollouts, on disk.
    """

    steps: int = sampler_steps(50)
    gamma: float = field(
        default=0.9, metadata={"min": 0.0, "max": 1.0, "help": "discount γ in (0,1]: weight of a transition by the steps that follow it"}
    )
    alpha: float = field(
        default=4.0,
        metadata={"min": 0.0, "help": "weight α of the KL per latent element (official 2.0 or 0.005 without the ½: 4.0 or 0.01 here)"},
    )
    estimator: Estimator = field(default="base", metadata={"help": "x0 after the transition: the base model, or a consistency adapter"})
    replay: Sampling = field(
        default="uniform", metadata={"help": "states drawn: uniform, prioritised (reward·γ^…), or newest: one of each of the last rollouts"}
    )
    buffer_gb: float = field(
        default=2.0, metadata={"min": 0.0, "help": "size of the replay buffer on disk; 0 trains on new rollouts alone"}
    )
    collect_every: int = field(
        default=1,
        metadata={"min": 1, "max": 1000, "help": "micro-batches per collection of new rollouts (official 1); more reuses old ones"},
    )
    guidance_scale: float = training_guidance_scale(5.0, "official 5, tuned and base alike")
    reward_weight: float = weight_of_reward()

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma = {self.gamma}: the discount lies in (0, 1]")
        if self.buffer_gb == 0 and self.collect_every > 1:
            raise ValueError("collect_every above 1 reuses old rollouts: it needs a replay buffer (buffer_gb)")

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """All steps are trained, most of all the last ones: the first level whose discount is a tenth or more."""
        weights = [self.gamma ** (self.steps - 1 - i) for i in range(self.steps)]
        return float(sigmas[next(i for i, w in enumerate(weights) if w >= 0.1)])

    def capacity(self, policy: Policy) -> int:
        """Trajectories that the buffer's size holds."""
        return int(self.buffer_gb * 1e9 / trajectory_bytes(self.steps, policy.latent_shape))

    def check(self, context: RunContext) -> None:
        """Refuse a buffer that no rollout fits into, or that the disk cannot take, and an estimator that is not loaded."""
        policy = context.policy
        if self.estimator not in policy.adapters:
            raise ValueError(
                "estimator = consistency needs a consistency adapter (an LCM-LoRA) of this model: set `consistency`, or estimator = base"
            )
        if self.buffer_gb > 0:
            if self.capacity(policy) < 1:
                size = trajectory_bytes(self.steps, policy.latent_shape) / 1e9
                raise ValueError(f"one rollout of {self.steps} states takes {size:.3g} GB: buffer_gb = {self.buffer_gb:g} holds none")
            free = free_bytes(context.folder) / 1e9
            if self.buffer_gb > free:
                raise ValueError(f"buffer_gb = {self.buffer_gb:g}, but {context.folder} lies on a disk with {free:.3g} GB free")

    def begin(self, context: RunContext) -> Loss:
        """A run's loss, which owns the buffer."""
        return SoftQ(self, context)


class SoftQ(Loss):
    """SQDF with its replay buffer."""

    def __init__(self, objective: SQDF, context: RunContext) -> None:
        self.objective, self.run = objective, context
        capacity, main = objective.capacity(context.policy), context.processes.main
        self.replay = Replay(context.folder / "replay", capacity, deletes=main) if objective.buffer_gb > 0 else None
        self._opened = False

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        x, prompts, index, collected = self._states(batch)
        loss, logs = transition_loss(self.objective, self.run, prompts, batch.rng, x, index)
        return loss, {**logs, "rollout reward": collected} if collected is not None else logs

    def _states(self, batch: Batch) -> tuple[Tensor, Sequence[str], Tensor, Tensor | None]:
        """States x (B,C,h,w), their prompts, their indices (B,), and the rewards (B,) of new rollouts if any were made."""
        o, policy, exchange = self.objective, self.run.policy, self.run.processes.exchange
        if self.replay is None:
            index = batch.rng.integers("transition", 0, o.steps - 1)
            states, ends = rollouts(o, policy, batch.prompts, batch.rng)
            return states[torch.arange(len(index)), index], batch.prompts, index, self._rewards(ends, batch.prompts)
        if not self._opened:
            self.replay.saved()  # deletes the files of an earlier run in this folder
            exchange(None)  # before any process adds its own
            self._opened = True
        collected = None
        if batch.number % o.collect_every == 0 or not self.replay.trajectories:
            states, ends = rollouts(o, policy, batch.prompts, batch.rng)
            collected = self._rewards(ends, batch.prompts)
            # each process writes its own rollouts; all have the same list, in the order of the joined batch
            for rank, new in enumerate(exchange(list(zip(batch.prompts, collected.tolist())))):
                for row, (prompt, score) in enumerate(new):
                    self.replay.add(prompt, score, states[row] if rank == self.run.processes.rank else None)
            exchange(None)  # all files are written before one is read
        uniform = batch.rng.uniform("replay").float()  # float32 as in 0.1.0, so that the same states are drawn
        if o.replay == "newest":
            size = len(batch.prompts) * self.run.processes.count
            drawn = self.replay.newest(uniform, [i % size for i in batch.rng.indices], size, o.steps)
        else:
            drawn = self.replay.draw(uniform, o.replay, o.steps, o.gamma)
        x = torch.stack([self.replay.read(t, i) for t, i in drawn]).to(policy.device)
        return x, [t.prompt for t, _ in drawn], torch.tensor([i for _, i in drawn]), collected

    @torch.no_grad()
    def _rewards(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.run.scores(latents, prompts)

    def state(self) -> dict[str, Any]:
        """The buffer's list."""
        return {"replay": self.replay.state()} if self.replay else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        if self.replay and state.get("replay"):
            self.replay.restore(state["replay"])

    def saved(self) -> None:
        """Delete what left the buffer."""
        if self.replay:
            self.replay.saved()


@torch.no_grad()
def rollouts(objective: SQDF, policy: Policy, prompts: Sequence[str], rng: Rng) -> tuple[Tensor, Tensor]:
    """The tuned model's ancestral rollouts: states (B,T,C,h,w) before each transition, and their ends (B,C,h,w)."""
    x = policy.start(rng.start_noise(policy.latent_shape), objective.steps)
    denoiser = policy.denoiser(prompts, guidance_scale=objective.guidance_scale)
    noise_at = rng.step_noise(policy.latent_shape)
    states: list[Tensor] = []
    with policy.merged():
        for transition in trajectory(denoiser, x, policy.sigmas(objective.steps), noise_at, space=policy.space):
            states.append(transition.x)
            x = transition.x_next
    return torch.stack(states, 1), x


def transition_loss(objective: SQDF, run: RunContext, prompts: Sequence[str], rng: Rng, x: Tensor, index: Tensor) -> tuple[Tensor, Logs]:
    """SQDF's loss () of the transitions index (B,) from states x, and logs of (B,).

    The frozen estimate is the same network with another adapter, and its graph is kept apart: its gradient g = ∂r/∂x_{i+1} is
    taken at a detached x_{i+1}, then g·x_{i+1}(θ) is differentiated.
    """
    o, policy, sigmas = objective, run.policy, run.policy.sigmas(objective.steps)
    here, there = sigmas[index], sigmas[index + 1]
    denoised = policy.denoiser(prompts, guidance_scale=o.guidance_scale)(x, here)
    noise = rng.normal("transition noise", policy.latent_shape).to(x)
    following = step(x, denoised, here, there, noise, 1.0, policy.space)

    leaf = following.detach().requires_grad_()
    ended = there == 0
    with torch.enable_grad():
        # the last transition ends in x0 itself: its row is evaluated at the last level and not used
        guidance_scale = o.guidance_scale if o.estimator == "base" else 1.0
        estimator = policy.denoiser(prompts, adapter=o.estimator, guidance_scale=guidance_scale)
        estimate = estimator(leaf, torch.where(ended, sigmas[-2], there))
        scores = run.scores(torch.where(per_sample(ended, leaf).bool(), leaf, estimate), prompts)
        discounted = (o.gamma ** (o.steps - 1 - index).double()).to(scores) * scores
        (gradient,) = torch.autograd.grad(discounted.sum(), leaf)

    product = (gradient * following).flatten(1).sum(1)
    gain = (discounted.detach() + product - product.detach()).mean()  # the value of the reward term, with its gradient
    with torch.no_grad():
        base = policy.denoiser(prompts, adapter="base", guidance_scale=o.guidance_scale)(x, here)
    nats = kl_weights(sigmas, policy.space)[index].to(x) * (denoised - base).square().flatten(1).sum(1)
    per_element = nats / x[0].numel()
    loss = -o.reward_weight * gain
    if o.alpha > 0:
        loss = loss + o.alpha * per_element.mean()
    return loss, {"reward": scores.detach(), "kl": nats.detach(), "kl per element": per_element.detach()}


def kl_weights(sigmas: Tensor, space: Space) -> Tensor:
    """½(SNR' − SNR) of each transition (T,): times ‖D_θ − D_ref‖² it is the transition's KL in nats, exactly.

    Both are Gaussians of one width, and the difference of their means over it is √(SNR' − SNR)·ΔD, in either space.
    The last transition has width 0; its SNR' is taken as twice its SNR, the weight in ε that the official code's grid gives it.
    """
    before = snr(sigmas[:-1].cpu().double(), space)  # two steps: MPS, which has no float64, would convert before it copies
    after = torch.cat([before[1:], 2 * before[-1:]])
    return (after - before) / 2
