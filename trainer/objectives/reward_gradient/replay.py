"""A replay buffer of rollouts on disk: one file each, oldest out first, within a stated size.

What a checkpoint needs is the list of trajectories; see `state_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..state_files import StateFiles

Sampling = Literal["uniform", "prioritised", "newest"]


@dataclass(frozen=True)
class Trajectory:
    """One rollout: its number, prompt and the reward of its end."""

    number: int
    prompt: str
    reward: float


class Replay:
    """Trajectories of T states (C,h,w) each, half precision. `capacity` is their greatest number, `folder` theirs alone.

    Processes may share the folder, with equal lists: a file is written by one of them, and only one `deletes`.
    """

    def __init__(self, folder: Path, capacity: int, deletes: bool = True) -> None:
        if capacity < 1:
            raise ValueError("a replay buffer must hold at least one trajectory")
        self.capacity = capacity
        self.store = StateFiles(folder, r"\d{9,}\.(safetensors(\.partial)?|partial)", "trajectories of the replay buffer", deletes)
        self.trajectories: list[Trajectory] = []
        self.count = 0  # ever added

    def add(self, prompt: str, reward: float, states: Tensor | None) -> Trajectory:
        """Keep a rollout's states (T,C,h,w), state i before transition i; the oldest leaves where the buffer is full.

        Without states it enters the list alone: another process writes its file.
        """
        new = Trajectory(self.count, prompt, reward)
        if states is not None:
            self.store.write(_name(new), states.cpu().half())
        self.count += 1
        self.trajectories = [*self.trajectories, new][-self.capacity :]
        return new

    def read(self, trajectory: Trajectory, index: int) -> Tensor:
        """State `index` (C,h,w) of a trajectory, float32."""
        return self.store.read(_name(trajectory), index).float()

    def probabilities(self, sampling: Sampling, steps: int, gamma: float) -> Tensor:
        """Chance (n,T) float64 of every state of every trajectory.

        uniform: all alike. prioritised: in proportion to max(reward, 0)·γ^(T−1−i) (SQDF, arXiv:2512.04559, official code's
        rule; uniform over trajectories where no reward is positive). newest has none: see `newest`.
        """
        n = len(self.trajectories)
        if sampling == "uniform":
            return torch.full((n, steps), 1 / (n * steps), dtype=torch.float64)
        worth = torch.tensor([max(t.reward, 0.0) for t in self.trajectories], dtype=torch.float64)
        if float(worth.sum()) == 0:
            worth = torch.ones_like(worth)
        credit = gamma ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        joint = worth[:, None] * credit[None]
        return joint / joint.sum()

    def draw(self, uniform: Tensor, sampling: Sampling, steps: int, gamma: float) -> list[tuple[Trajectory, int]]:
        """A trajectory and the index of a state for each of the `uniform` numbers in [0,1), by inverting the distribution."""
        chances = self.probabilities(sampling, steps, gamma).flatten().cumsum(0)
        rows = torch.searchsorted(chances, uniform.double() * chances[-1], right=True).clamp(max=len(chances) - 1)
        return [(self.trajectories[int(row) // steps], int(row) % steps) for row in rows]

    def newest(self, uniform: Tensor, rows: Sequence[int], size: int, steps: int) -> list[tuple[Trajectory, int]]:
        """A state of each of the `size` most recent trajectories, those at `rows` of them: `uniform` in [0,1) draws its index.

        A buffer with fewer trajectories gives several states of one.
        """
        n = len(self.trajectories)
        index = (uniform.double() * steps).long().clamp(max=steps - 1).tolist()
        return [(self.trajectories[(n - size + row) % n], i) for row, i in zip(rows, index, strict=True)]

    # -- on disk -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The list, for a checkpoint."""
        return {"count": self.count, "held": [asdict(t) for t in self.trajectories]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The list of a checkpoint; files of later trajectories are deleted, a missing one is an error."""
        self.count, self.trajectories = state["count"], [Trajectory(**t) for t in state["held"]]
        self.store.restore([_name(t) for t in self.trajectories])

    def saved(self) -> None:
        """The list is in a checkpoint: delete the files that are not on it."""
        self.store.saved([_name(t) for t in self.trajectories])

    def clear(self) -> None:
        """Empty the list; files are deleted with the next checkpoint."""
        self.trajectories = []


def _name(trajectory: Trajectory) -> str:
    return f"{trajectory.number:09d}.safetensors"


def trajectory_bytes(steps: int, latent_shape: tuple[int, int, int]) -> int:
    """Size of one trajectory's file, but for its small header."""
    channels, height, width = latent_shape
    return 2 * steps * channels * height * width
