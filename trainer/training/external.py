"""Rewards outside this process: a run that one of them stops keeps its state."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..objectives.base import Loss
from ..reward import Reward, RewardUnavailable
from ..runtime.processes import Processes
from .loop import Step
from .nfe import CountingPolicy

Before = tuple[dict[str, Any], dict[str, int]]
"""The loss's state and what was spent before a step that did not end."""


class Saved(Protocol):
    """What a run that can be saved has."""

    reward: Reward | None
    loss: Loss
    counted: CountingPolicy
    processes: Processes
    step: int

    @property
    def checkpoint_path(self) -> Path:
        """The resumable state."""
        ...

    def save(self, before: Before | None = None) -> None:
        """Write it."""
        ...


def or_saved(run: Saved, steps: Iterator[Step]) -> Iterator[Step]:
    """The optimizer steps; where an external reward gives no score, the state before that step is saved.

    The loss may have changed within the step, so its state is copied before each.
    """
    external = getattr(run.reward, "external", False)
    while True:
        before = (copy.deepcopy(run.loss.state()), dict(run.counted.spent)) if external else None
        with saving(run, before):
            done = next(steps, None)
        if done is None:
            return
        yield done


@contextmanager
def saving(run: Saved, before: Before | None = None) -> Generator[None]:
    """Inside, RewardUnavailable saves the run, with the loss's state and what was spent `before` where these are given.

    Of several processes none can save while the others wait for it: their last checkpoint stays.
    """
    try:
        yield
    except RewardUnavailable as error:
        if run.processes.count == 1:
            run.save(before)
            error.args = (f"{error}; saved {run.checkpoint_path} after step {run.step}: --resume goes on",)
        raise
