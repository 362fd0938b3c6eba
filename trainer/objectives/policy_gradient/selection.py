"""A round of images, and what a micro-batch trains of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...rng import Rng


@dataclass(frozen=True)
class Round:
    """One round: its number, the optimizer step that began with it, and of its N images scores, advantages (N,) and log-probabilities."""

    number: int
    step: int
    scores: Tensor
    advantages: Tensor
    log_probs: Tensor
    """(N,W): of the trained steps when they were drawn."""
    held: Tensor
    """(N,) bool: the images that the distance to the base model counts for."""


@dataclass(frozen=True)
class Selection:
    """What a micro-batch trains: B samples of a round."""

    prompts: tuple[str, ...]
    rng: Rng
    states: Tensor
    """(B,K,C,h,w): the states that the objective keeps, of which it takes those of `index`."""
    index: Tensor
    """(B,): the sampler step that is trained."""
    advantages: Tensor
    log_probs: Tensor | None
    """(B,): when the round was drawn; None before the first optimizer step since, when they are those of now."""
    held: Tensor
    """(B,): 1 where the distance to the base model counts, otherwise 0."""
