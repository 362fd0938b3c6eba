"""Rewards outside this process: a run that one of them stops keeps its state."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..reward import RewardUnavailable
from .loop import Step

if TYPE_CHECKING:
    from .run import Before, Run


def or_saved(run: Run, steps: Iterator[Step]) -> Iterator[Step]:
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
def saving(run: Run, before: Before | None = None) -> Generator[None]:
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
