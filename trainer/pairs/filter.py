"""Which of the labelled pairs are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..text import counted
from .label import Pair
from .near_copies import Thumbnails

TextFeatures = Callable[[Sequence[str]], Tensor]
"""P prompts -> unit vectors (P,D)."""


@dataclass(frozen=True)
class Filter:
    """What a pair needs to be kept, and how many are."""

    min_margin: float = field(default=0.0, metadata={"min": 0.0, "help": "least margin, in standard deviations"})
    max_margin: float = field(default=0.0, metadata={"min": 0.0, "help": "largest margin; 0: no limit"})
    min_agreement: float = field(
        default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "least share of the rewards that prefer the better image"}
    )
    near_copies: float = field(
        default=0.02,
        metadata={
            "min": 0.0,
            "max": 1.0,
            "help": "images no farther apart than this (RMS of 16×16 averages) are near-copies: no pair, never on both sides of the split",
        },
    )
    per_prompt: int = field(default=1, metadata={"min": 0, "help": "pairs of each prompt at most, those of the highest value; 0: all"})
    keep: int = field(default=0, metadata={"min": 0, "help": "pairs in all at most, those of the highest value; 0: all"})
    quality_weight: float = field(default=0.0, metadata={"min": 0.0, "help": "weight of a prompt's quality in the value of its pairs"})
    diversity_weight: float = field(
        default=0.0, metadata={"min": 0.0, "help": "weight of the distance to other prompts in the value of a pair"}
    )
    neighbours: int = field(default=5, metadata={"min": 1, "help": "the k of the k-th nearest prompt, whose distance counts"})

    def __post_init__(self) -> None:
        if self.max_margin and self.max_margin < self.min_margin:
            raise ValueError(f"max_margin = {self.max_margin:g} is below min_margin = {self.min_margin:g}: give a range")


def valued(pairs: Sequence[Pair], settings: Filter, features: TextFeatures | None, quality: Mapping[str, float] | None) -> list[Pair]:
    """The pairs with their value: margin + α·quality(prompt) + γ·log d_k(prompt).

    The form of FiFA (Yang et al. 2025, arXiv:2410.10166), from its paper alone: a score of each pair, whose highest are taken.
    d_k: distance of the prompt's features to those of the k-th nearest other prompt, a k-nearest-neighbour estimate of entropy. Its
    quality is a language model's, 1 to 10; its constants and units could not be verified, so that the weights α and γ are 0 by
    default. quality: by prompt.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    bonus = dict.fromkeys(prompts, 0.0)
    if settings.quality_weight:
        if quality is None:
            raise ValueError("quality_weight is set: give the quality of each prompt, a table with columns prompt and quality")
        check_quality(prompts, quality)
        bonus = {prompt: settings.quality_weight * quality[prompt] for prompt in prompts}
    if settings.diversity_weight and len(prompts) > 1:
        if features is None:
            raise ValueError("diversity_weight is set: distances of prompts need a two-tower reward among the rewards")
        for prompt, distance in zip(prompts, neighbour_distances(features(prompts), settings.neighbours)):
            bonus[prompt] += settings.diversity_weight * math.log(max(distance, 1e-6))
    return [replace(pair, value=_margin(pair) + bonus[pair.prompt]) for pair in pairs]


def check_quality(prompts: Iterable[str], quality: Mapping[str, float]) -> None:
    """ValueError where a prompt has none."""
    lacking = [prompt for prompt in dict.fromkeys(prompts) if prompt not in quality]
    if lacking:
        raise ValueError(f"no quality is given for {counted(len(lacking), 'prompts')}, such as {lacking[0]!r}: give one of each")


def neighbour_distances(features: Tensor, k: int) -> list[float]:
    """Distance of each of P ≥ 2 vectors (P,D) to its k-th nearest other, or to the farthest where there are fewer."""
    features = features.detach().cpu().double()
    k = min(k, len(features) - 1)
    parts = [torch.cdist(part, features, compute_mode="donot_use_mm_for_euclid_dist") for part in features.split(256)]
    return torch.cat([part.kthvalue(k + 1, dim=1).values for part in parts]).tolist()  # the nearest of all is itself


def _margin(pair: Pair) -> float:
    if pair.margin is None:
        raise ValueError("these pairs have no margins, because no reward scored them: make pairs from images and rewards")
    return pair.margin


def filtered(pairs: Sequence[Pair], settings: Filter, thumbnails: Thumbnails, dropped: Counter[str]) -> list[Pair]:
    """The pairs that are kept, of `valued` ones, in their order; `dropped` counts the others by reason."""
    ranked = sorted(range(len(pairs)), key=lambda i: (-(pairs[i].value or 0.0), i))
    taken, kept = Counter[str](), list[int]()
    for i in ranked:
        pair = pairs[i]
        reason = _reason(pair, settings)
        if not reason and settings.per_prompt and taken[pair.prompt] >= settings.per_prompt:
            reason = "beyond the number per prompt"
        if not reason and thumbnails.distance(pair.chosen, pair.rejected) <= settings.near_copies:  # after the cap: it decodes images
            reason = "near-copies of each other"
        if reason:
            dropped[reason] += 1
            continue
        taken[pair.prompt] += 1
        kept.append(i)
    if settings.keep and len(kept) > settings.keep:
        dropped["of lower value"] += len(kept) - settings.keep
        kept = kept[: settings.keep]
    return [pairs[i] for i in sorted(kept)]


def _reason(pair: Pair, settings: Filter) -> str:
    """Why a pair is not kept, as far as its scores tell; "" where they do not."""
    margin = _margin(pair)
    if margin < 0:
        return "rewards contradict the label"
    if margin < settings.min_margin:
        return "margin too small"
    if settings.max_margin and margin > settings.max_margin:
        return "margin too large"
    if (pair.agreement or 0.0) < settings.min_agreement:
        return "rewards disagree"
    return ""
