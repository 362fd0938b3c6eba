"""Preferences between sampler steps: of each pair the one that the reward likes better becomes likelier than the other.

With ρ = π(x' | x)/π_base(x' | x) of a step from x to x', clipped to 1 ± `clip`, a pair's loss is −log σ(β·log ρ_w − β·log ρ_l).
Log-probabilities are means over the elements, as in the official code of SPO and PSO. The reward is never differentiated.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...rng import Rng
from ...sampling import Kernel, Space, gaussian
from ..base import Logs, Loss, RunContext
from ..shared import in_order, sampler_steps
from .advantages import equal
from .collecting import Collected, Collecting
from .steps import log_prob

log = logging.getLogger(__name__)


def pair_losses(better: Tensor, worse: Tensor, beta: float, clip: float) -> Tensor:
    """−log σ(β·(log ρ_w − log ρ_l)) (B,) of log-ratios (B,), whose ρ are clipped to 1 ± clip."""
    least, most = math.log1p(-clip), math.log1p(clip)
    return -F.logsigmoid(beta * (better.clamp(least, most) - worse.clamp(least, most)))


@dataclass(frozen=True)
class StepPairs(Collecting):
    """Rounds of pairs of steps. A subclass says how it draws them, and where a step begins and ends among the states that are kept."""

    unit: ClassVar[str] = "prompts"
    steps: int = sampler_steps(20)
    group: int = field(default=2, metadata={"min": 2, "max": 1024, "help": "of which best and worst are compared"})
    beta: float = field(default=10.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base (SPO 10, LPO 500)"})
    clip: float = field(
        default=0.1, metadata={"min": 1e-6, "max": 0.999, "help": "probability ratios to the base are clipped to 1 ± this (official 0.1)"}
    )
    trained_count: int = field(
        default=0, metadata={"min": 0, "max": 1000, "help": "trained steps, from the first on; 0: all but the last, which has no noise"}
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group = {self.group}: a pair is the best and the worst of a group, give at least 2")
        noisy = self.steps - 1 - self.first
        if noisy < 1:
            where = f" from step {self.first} on" if self.first else ""
            raise ValueError(f"steps = {self.steps}: the last step has no noise, and none is left to train{where}; give more")
        if self.trained_count > noisy:
            raise ValueError(f"trained_count = {self.trained_count}: from the first trained step on {noisy} steps have noise")

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The Gaussian of a step."""

    @property
    def first(self) -> int:
        """The first trained step."""
        return 0

    @property
    def rollouts(self) -> int:
        """One for each prompt: the pairs of all its steps."""
        return self.prompts_per_round

    @property
    def trained(self) -> int:
        """W."""
        return self.trained_count or self.steps - 1 - self.first

    def trained_steps(self, seed: int, number: int) -> Tensor:
        """The same in every round."""
        return torch.arange(self.first, self.first + self.trained).expand(self.rollouts, -1)

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """That of the first trained step."""
        return float(sigmas[min(len(sigmas) - 2, self.first * (len(sigmas) - 1) // self.steps)])

    def gaps(self, sigmas: Tensor, space: Space) -> Tensor:
        """Σ (W,): pairs are trained whose softmax of the two scores differs by more."""
        return torch.zeros(self.trained)

    @abstractmethod
    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """States (B,K,C,h,w) of B prompts, and the scores (B,W) of the better and of the worse of each step's pair."""

    @abstractmethod
    def log_ratios(self, run: RunContext, prompts: Sequence[str], states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """log ρ (B,) of the better and of the worse of each pair, from the states (B,k,C,h,w) that its step needs."""

    def ratios(self, run: RunContext, prompts: Sequence[str], x: Tensor, ends: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        """log ρ (B,) of the steps `index` (B,) from x (B,C,h,w) to each of some ends, whose model is evaluated once."""
        policy, sigmas = run.policy, run.policy.sigmas(self.steps)
        here, there = sigmas[index], sigmas[index + 1]

        def step(adapter: str) -> tuple[Tensor, Tensor]:
            denoiser = policy.denoiser(prompts, adapter=adapter, guidance_scale=self.guidance_scale)
            return gaussian(x, denoiser(x, here), here, there, self.kernel, policy.space)

        with torch.no_grad():
            base = step("base")
        tuned = step("tuned")
        return [log_prob(end, *tuned) - log_prob(end, *base) for end in ends]

    def begin(self, context: RunContext) -> Loss:
        """A run's loss, which owns the present round."""
        return PairRounds(self, context)


@dataclass(frozen=True)
class PairRound:
    """One round: its number, and the scores (N,W) of the better and of the worse of each step's pair."""

    number: int
    better: Tensor
    worse: Tensor
    weights: Tensor
    """(N,W): 0 of pairs that are not trained, of the others the inverse of their share."""


class PairRounds(Collected[StepPairs, PairRound]):
    """The rounds of one run.

    A round's mean is over the pairs that are trained; the others are not evaluated.
    """

    def _loss(self, rng: Rng, present: PairRound, rollout: Tensor, turn: Tensor) -> tuple[Tensor, Logs]:
        o, (prompts, index) = self.objective, self._chosen(rng.seed, present.number)
        weights = present.weights[rollout, turn]
        rows = weights.nonzero()[:, 0]
        if len(rows) == 0 and self.run.processes.sharded:  # whose evaluations all processes take part in
            rows = torch.zeros(1, dtype=torch.long)
        some, turns = rollout[rows], turn[rows]
        if len(rows) > 0:
            states = self._states(index, some, turns)
            better, worse = o.log_ratios(self.run, [prompts[i] for i in some.tolist()], states, index[some, turns])
        else:  # none of no pairs, with a gradient of 0
            better = worse = torch.stack([p.sum() for p in self.run.policy.parameters()])[:0]
        losses = pair_losses(better, worse, o.beta, o.clip) * weights[rows].to(better)
        margin, outside = (better - worse).detach().cpu(), torch.stack([better, worse]).detach().cpu().expm1().abs().amax(0) > o.clip
        logs = {"reward": (present.better + present.worse)[rollout, turn] / 2, "pairs": (weights > 0).float()}
        for name, values in (("margin", o.beta * margin), ("accuracy", in_order(margin)), ("clipped", outside)):  # means over trained pairs
            logs[name] = torch.zeros_like(weights).index_copy(0, rows, values.to(weights) * weights[rows])
        return losses.sum() / len(weights), logs

    @torch.no_grad()
    def _collect(self, rng: Rng, number: int, chunk: int) -> PairRound:
        """Draw and score a round's pairs, about `chunk` images at a time; processes share the prompts."""
        o, run = self.objective, self.run

        def draw(part: Sequence[str], seeds: Rng, rows: range) -> tuple[Tensor, ...]:
            members = Rng(seeds.seed, seeds.step, tuple(i * o.group + j for i in rows for j in range(o.group)))
            states, better, worse = o.draw(run, part, members)
            return states, better.float().cpu(), worse.float().cpu()

        better, worse = self._drawn(rng, number, max(1, chunk // o.group), draw)
        prompts, _ = self._chosen(rng.seed, number)
        return PairRound(number, better, worse, self._weights(prompts, better, worse))

    def _weights(self, prompts: Sequence[str], better: Tensor, worse: Tensor) -> Tensor:
        """Which pairs (N,W) are trained, times the inverse of their share, of scores (N,W)."""
        o, policy = self.objective, self.run.policy
        if policy.device.type == "meta":  # a plan's scores have no values
            return torch.ones(better.shape)
        bad = ~(better.isfinite() & worse.isfinite())
        if bool(bad.any()):
            row, step = bad.nonzero()[0].tolist()
            value = next(float(x[row, step]) for x in (worse, better) if not bool(x[row, step].isfinite()))
            raise ValueError(f"the reward of an image of {prompts[row]!r} is {value}: no pair can be compared; check the reward")
        distance = ((better - worse) / 2).tanh()  # of the softmax of two scores
        apart = (distance > o.gaps(policy.sigmas(o.steps), policy.space).to(distance)) & ~equal(torch.stack([better, worse], -1))
        if not bool(apart.any()):
            most = float((better - worse).max())
            said = f"of the round's {apart.numel()} pairs none is trained: the scores of a pair differ by {most:.3g} at most"
            if self.round is None:
                raise ValueError(f"{said}; choose a reward that tells them apart, or a larger unit, a smaller gap or a larger group")
            log.warning("%s", said)
        return apart.float() * apart.numel() / max(1, int(apart.sum()))

    def _restored(self, values: Mapping[str, Any]) -> PairRound:
        return PairRound(**values)
