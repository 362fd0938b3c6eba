"""What is drawn in rounds and then trained: rollouts on disk, shared by processes, and micro-batches of them.

A round has N rollouts with W trained steps each: N·W samples, which micro-batches take in a random order, `passes` times.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...data.batches import Batch
from ...policy import Policy
from ...rng import Rng, generator, seed_of
from ...runtime.files import free_bytes
from ..base import Logs, Loss, RunContext, WithoutRewardGradient
from ..shared import sampler_steps, training_guidance_scale
from .store import File, Rollouts


@dataclass(frozen=True)
class Collecting(WithoutRewardGradient):
    """Rounds of rollouts. A subclass says what a rollout is, which of its steps it trains, and the losses of a part."""

    unit: ClassVar[str] = "images"
    """What one rollout is called in messages."""
    steps: int = sampler_steps(50)
    guidance_scale: float = training_guidance_scale(5.0, "official 5")
    group: int = field(default=8, metadata={"min": 1, "max": 1024, "help": "images of a prompt in a round, which are compared"})
    prompts_per_round: int = field(default=8, metadata={"min": 1, "max": 100000, "help": "prompts of a round of rollouts"})
    passes: int = field(default=1, metadata={"min": 1, "max": 100, "help": "times that a round is trained on (official 1)"})

    @property
    @abstractmethod
    def rollouts(self) -> int:
        """N, the rollouts of a round: a multiple of `prompts_per_round`."""

    @property
    @abstractmethod
    def trained(self) -> int:
        """W, the trained steps of a rollout."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """K, the states that are kept of a rollout."""

    @abstractmethod
    def trained_steps(self, seed: int, number: int) -> Tensor:
        """The indices (N,W) of the sampler steps that round `number` trains."""

    @abstractmethod
    def needed(self, step: int) -> Sequence[int]:
        """Which of the K states the step needs that is `step` steps after the first."""

    def check(self, context: RunContext) -> None:
        """Refuse micro-batches that do not divide a round, and a disk that a round does not fit on."""
        samples, count = self.rollouts * self.trained, context.processes.count
        if context.batch_size and samples % context.batch_size:
            raise ValueError(
                f"batch_size = {context.batch_size}: a round has {self.rollouts} {self.unit} × {self.trained} trained steps = {samples} "
                "samples, give a divisor of that"
            )
        if context.processes.sharded and self.rollouts % count:
            raise ValueError(
                f"a round has {self.rollouts} {self.unit}: with sharded weights (FSDP) give a multiple of {count} processes, by "
                "prompts_per_round"
            )
        needed, free = self.round_bytes(context.policy) / 1e9, free_bytes(context.folder) / 1e9
        if 2 * needed > free:  # beside the round of the last checkpoint
            raise ValueError(
                f"a round takes {needed:.3g} GB twice, but {context.folder} lies on a disk with {free:.3g} GB free: lower group, "
                "prompts_per_round or the trained steps"
            )

    def round_bytes(self, policy: Policy) -> int:
        """Size of a round's states on disk."""
        channels, height, width = policy.latent_shape
        return 4 * self.rollouts * self.kept * channels * height * width

    def prompts_of(self, prompts: Sequence[str], seed: int, number: int) -> list[str]:
        """The prompts (N,) of round `number`, each as often as it has rollouts: all of a run's in a random order, again and again."""
        chosen: list[str] = []
        for place in range(number * self.prompts_per_round, (number + 1) * self.prompts_per_round):
            order = torch.randperm(len(prompts), generator=generator(seed, "prompts", place // len(prompts)))
            chosen += [prompts[int(order[place % len(prompts)])]] * (self.rollouts // self.prompts_per_round)
        return chosen


class Numbered(Protocol):
    """What is known of a round: of tensors and plain values alone."""

    @property
    def number(self) -> int:
        """Of the round."""
        ...


Settings = TypeVar("Settings", bound=Collecting)
RoundOf = TypeVar("RoundOf", bound=Numbered)
Drawing = Callable[[Sequence[str], Rng, range], tuple[Tensor, ...]]
"""Prompts (B,), their random numbers and the numbers of their rollouts -> states (B,K,C,h,w), and figures (B,…) on the CPU."""


class Collected(Loss, Generic[Settings, RoundOf]):
    """The rounds of one run. `round` is the present one."""

    def __init__(self, objective: Settings, run: RunContext) -> None:
        self.objective, self.run = objective, run
        self.store = Rollouts(run.folder / "rollouts", deletes=run.processes.main)
        self.round: RoundOf | None = None
        self._draws: tuple[int, tuple[list[str], Tensor]] | None = None
        self._over = False  # whether the next optimizer step begins another round

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        o, rng = self.objective, batch.rng
        samples = o.rollouts * o.trained
        number = rng.indices[0] // (o.passes * samples)
        self._over = self.run.step_samples > 0 and (rng.step + 1) * self.run.step_samples % (o.passes * samples) == 0
        if self.round is None or self.round.number != number:
            self.round = self._collect(rng, number, len(batch.prompts))
        order = torch.randperm(samples, generator=generator(rng.seed, "order", rng.indices[0] // samples))  # another one in each pass
        rows = order[torch.tensor(rng.indices) % samples]
        return self._loss(rng, self.round, rows // o.trained, rows % o.trained)

    @abstractmethod
    def _collect(self, rng: Rng, number: int, chunk: int) -> RoundOf:
        """Draw round `number`, `chunk` images at a time."""

    @abstractmethod
    def _loss(self, rng: Rng, present: RoundOf, rollout: Tensor, turn: Tensor) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,) of the trained steps `turn` (B,) of rollouts (B,)."""

    def _drawn(self, rng: Rng, number: int, size: int, draw: Drawing) -> list[Tensor]:
        """A round's rollouts, `size` at a time, of which processes each draw a share: states on disk, and all figures (N,…)."""
        o, run, exchange = self.objective, self.run, self.run.processes.exchange
        if self.round is None:
            self.store.saved()  # deletes the files of an earlier run in this folder
            exchange(None)  # before any process adds its own
        prompts, _ = self._chosen(rng.seed, number)
        share, made = run.processes.share(o.rollouts), list[tuple[File, tuple[Tensor, ...]]]()
        for first in range(share.start, share.stop, size):
            rows = range(first, min(first + size, share.stop))
            states, *figures = draw(prompts[rows.start : rows.stop], Rng(seed_of(rng.seed, "round"), number, tuple(rows)), rows)
            made.append((self.store.write(number, first, states), tuple(figures)))
        files, columns = zip(*(one for some in exchange(made) for one in some))
        self.store.replace(files)
        return [torch.cat(parts) for parts in zip(*columns)]

    def _states(self, index: Tensor, rollout: Tensor, turn: Tensor) -> Tensor:
        """The states (B,k,C,h,w) that the trained steps `turn` (B,) of rollouts (B,) need, where the policy is."""
        needed = [self.objective.needed(step) for step in (index[rollout, turn] - index.min()).tolist()]
        states = [torch.stack([self.store.read(i, k) for k in some]) for i, some in zip(rollout.tolist(), needed, strict=True)]
        return torch.stack(states).to(self.run.policy.device)

    def _chosen(self, seed: int, number: int) -> tuple[list[str], Tensor]:
        """The prompts (N,) of a round and the indices (N,W) of its trained steps."""
        if self._draws is None or self._draws[0] != number:
            self._draws = number, (self.objective.prompts_of(self.run.prompts, seed, number), self.objective.trained_steps(seed, number))
        return self._draws[1]

    @abstractmethod
    def _restored(self, values: Mapping[str, Any]) -> RoundOf:
        """A round from the values that `state` saved of it."""

    def state(self) -> dict[str, Any]:
        """The round and its list of files."""
        if self.round is None:
            return {}
        return {"round": vars(self.round), "files": [] if self._over else [list(file) for file in self.store.files]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        if state:
            self.round = self._restored(state["round"])
            self.store.restore(state["files"])
            self._over = not state["files"]

    def saved(self) -> None:
        """Delete the files of rounds that no checkpoint needs, all of them where the round is over."""
        if self._over:
            self.store.replace(())
        self.store.saved()
