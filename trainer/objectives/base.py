"""What every objective is. An objective describes a method; beginning a run with it gives the loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..data.batches import Batch, Prompts
from ..guidance import Mix, Slot, cfg
from ..policy import Policy
from ..reward import Reward
from ..runtime.processes import ALONE, Processes

Logs = dict[str, Tensor]


class ImageFeatures(Protocol):
    """Frozen features of a two-tower model."""

    def image_features(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,D), differentiable."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B,D)."""
        ...


@dataclass(frozen=True)
class RunContext:
    """What a run gives its objective: the model, the reward, and for stateful objectives features, a folder and all prompts."""

    policy: Policy
    reward: Reward | None = None
    features: ImageFeatures | None = None
    processes: Processes = ALONE
    folder: Path = Path()
    prompts: tuple[str, ...] = ()
    batch_size: int = 0
    """Samples of a micro-batch, summed over all processes; 0 where it is not known."""
    step_samples: int = 0
    """Samples of an optimizer step, likewise."""

    @property
    def required_reward(self) -> Reward:
        """The reward, or a ValueError where the run has none."""
        if self.reward is None:
            raise ValueError("this objective needs a reward: set `reward`")
        return self.reward

    def scores(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards (B,) of finished latents (B,C,h,w), differentiable where the reward is."""
        return self.required_reward(self.policy.decode(latents), prompts)


class Loss(ABC):
    """What the training loop calls. State between steps is saved with every checkpoint and restored from it."""

    @abstractmethod
    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,) by name."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for the checkpoint; empty for stateless objectives."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        return

    def held(self) -> Sequence[Tensor]:
        """Tensors beside the model that stay on the device between steps, for the plan of a run's memory."""
        return ()

    def saved(self) -> None:
        """Called after a checkpoint with the present state was written: files that only older ones need may be deleted."""
        return


class Objective(ABC):
    """A frozen dataclass whose fields are the config keys, the CLI flags and the node widgets."""

    title: ClassVar[str]
    """As pages, nodes and presets write it; the name of the class where it says nothing else."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Fields of what it is derived from that mean nothing here: no widget, no line of help, and refused where they are set."""
    reads_details: ClassVar[bool] = False
    """Whether it heeds `data.batches.Details`."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Adapters that are trained beside `tuned`, each written to a file of its own; `policy.with_companions` names both."""
    trains_distilled: ClassVar[bool] = False
    """Whether it trains a model that is distilled to few steps as such."""
    steps: int
    guidance_scale: float

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "title" not in cls.__dict__:
            cls.title = cls.__name__

    @property
    def data(self) -> type[Prompts]:
        """The batches it trains on: Prompts, Images, Pairs or Labels."""
        return Prompts

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return True

    @property
    def needs_reward(self) -> bool:
        """Whether a reward is trained on."""
        return True

    def captions(self, prompts: Sequence[str]) -> list[str]:
        """The texts that the model reads in training on these prompts, beside the empty one."""
        return list(prompts)

    def wordings(self, prompts: Sequence[str]) -> list[str]:
        """The texts that a reward reads in training on these prompts."""
        return list(prompts)

    @abstractmethod
    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Noise level from which the tuned model has been trained: where combined generation should switch to it."""

    @property
    def guide(self) -> str:
        """The guide that `mix` is of, for the result's metadata; "" for the model by itself."""
        return ""

    def mix(self, tuned: Slot, sigmas: Tensor) -> Mix:
        """What draws images with the adapter of `tuned` at its guidance scale, over levels (T+1,): here that model by itself.

        Evaluations of a run and the comparison draw by it. Raises ValueError for a scale at which the adapter takes no part.
        """
        return cfg(tuned)

    def check(self, context: RunContext) -> None:
        """Raise ValueError where these settings cannot work with this policy, reward or disk; called before any step."""
        return

    @abstractmethod
    def begin(self, context: RunContext) -> Loss:
        """The loss of one run."""


class WithoutRewardGradient(Objective):
    """An objective that trains every noise level, and never asks for a reward's gradient."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Every level is trained."""
        return float(sigmas[0])


class WithoutReward(WithoutRewardGradient):
    """An objective that asks no reward: one that is named is shown by the watch alone."""

    @property
    def needs_reward(self) -> bool:
        """None is asked."""
        return False


class Stateless(Objective):
    """An objective that keeps nothing between steps: a function of the run and the batch."""

    @abstractmethod
    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,) by name."""

    def begin(self, context: RunContext) -> Loss:
        """`loss` of this run."""
        return Bound(self, context)


@dataclass(frozen=True)
class Bound(Loss):
    """The loss of an objective that keeps nothing."""

    objective: Stateless
    run: RunContext

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        return self.objective.loss(self.run, batch)
