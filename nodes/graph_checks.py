"""What a training node refuses before anything is loaded, and what the trainer warns of while it trains."""

from __future__ import annotations

import logging
from typing import Any

from ..trainer.data.batches import Labels, Pairs, Prompts
from ..trainer.training import run
from .rewards import trained_on
from .training_data import TrainingData

log = logging.getLogger(__name__)
_TRAINER = run.__name__.removesuffix(".training.run")
_MOST = 8  # warnings in a report


class Warnings(logging.Handler):
    """Inside, it collects what the trainer warns of, which the log has too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, None] = {}  # each once, in their order

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a warning."""
        self._said[record.getMessage().removeprefix("warning: ")] = None

    def __enter__(self) -> Warnings:
        logging.getLogger(_TRAINER).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_TRAINER).removeHandler(self)

    def report(self) -> str:
        """A line for each, with a line break before it."""
        said = list(self._said)
        more = [f"and {len(said) - _MOST} more warnings, which the log has"] if len(said) > _MOST else []
        return "".join(f"\nwarning: {line}" for line in [*said[:_MOST], *more])


def check(data: TrainingData, objective: Any, reward: Any, features: Any, clip: Any) -> None:
    """Refuse what cannot be trained."""
    if issubclass(objective.data, (Pairs, Labels)) and not data.listed:
        kind = "pairs of a better and a worse image" if objective.data is Pairs else "liked and disliked images"
        raise ValueError(f"{type(objective).__name__} trains on {kind}: connect Make Pairs or Load Pairs to pairs")
    if not any(data.texts):
        raise ValueError("no prompt: write one per line, the caption of each image where images are connected")
    if features is not None and not getattr(features, "takes_prefixes", False):
        raise ValueError("features: only a two-tower reward (HPS, PickScore, CLIP) has features of images and texts")
    if objective.needs_gradient and not reward.differentiable:
        raise ValueError(
            f"reward {reward.name} has no gradient: training needs one that has (a two-tower one, say), or the black-box objective"
        )
    if clip is None and objective.captions(data.texts) != list(data.texts):
        raise ValueError(f"{type(objective).__name__} compares captions: connect a clip, which encodes each, instead of a conditioning")
    if not data.count and objective.data is not Prompts:
        raise ValueError(
            f"{type(objective).__name__} trains on real images as it is set: connect some to images or dataset, or choose settings that "
            "start from noise"
        )


def heldout_apart(objective: Any, reward: Any, heldout: Any, resumed: bool) -> str:
    """ValueError where the held-out reward is one that is trained on; of a run that is resumed, a line of the report instead."""
    same = trained_on(heldout, [reward]) if heldout is not None and objective.needs_reward else ""
    if not same:
        return ""
    said = f"heldout is {heldout.name}, and {same} is trained on, so that it rises with over-optimisation: connect another reward, or none"
    if not resumed:
        raise ValueError(said)
    log.warning(said)
    return f"\nwarning: {said}"
