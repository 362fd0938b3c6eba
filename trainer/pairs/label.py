"""Which of two images of a prompt is the better one, by several rewards."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from ..data.images import ImageSource
from ..data.samples import content_hash

Label = Literal["sum", "majority"]
"""sum: of the weighted scores; majority: of the rewards' votes."""
WITHOUT: dict[Label, str] = {"sum": "equal scores", "majority": "as many votes for either image"}
"""Why two images are no pair."""


@dataclass(frozen=True)
class Scored:
    """An image of a prompt with its score by each reward, and by the held-out one where there is one."""

    image: ImageSource
    prompt: str
    scores: tuple[float, ...]
    heldout: float | None = None


@dataclass(frozen=True)
class Pair:
    """A better and a worse image of a prompt.

    margin: how much better, in the rewards' units, standard deviations unless they are raw. agreement: the share of the rewards that
    prefer `chosen`. gaps: by reward, its score of `chosen` minus that of `rejected`. None where nobody scored the pair.
    """

    chosen: ImageSource
    rejected: ImageSource
    prompt: str
    margin: float | None = None
    agreement: float | None = None
    gaps: tuple[float, ...] = ()
    heldout: float | None = None
    value: float | None = None
    """What filters rank pairs by; see `filter.valued`."""


def significant(value: float) -> float:
    """For a table: nine digits, whatever the unit."""
    return float(f"{value:.9g}")


def candidates(scored: Iterable[Scored], weights: Sequence[float], label: Label, dropped: Counter[str]) -> Iterator[Pair]:
    """Every two images of each prompt as a pair, prompts in the order in which they come.

    weights: of the rewards, not 0; negative ones prefer low scores. `dropped` counts pairs without a better image.
    """
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.prompt, []).append(one)
    for group in groups.values():
        for first, second in combinations(group, 2):
            pair = labelled(first, second, weights, label)
            if pair is None:
                dropped[WITHOUT[label]] += 1
            else:
                yield pair


def labelled(first: Scored, second: Scored, weights: Sequence[float], label: Label) -> Pair | None:
    """The pair of two images of one prompt; None where neither is better.

    sum: margin is Σ wᵢΔᵢ, Δᵢ the gap of scores. majority, as BalancedDPO labels (Tamboli et al. 2025, arXiv:2503.12575; from its paper
    alone): each reward has one vote, whatever its weight, and equal scores none; margin, our choice, is the median of the gaps
    in the direction of its vote, so that no reward's scale decides.
    """
    gaps = [a - b for a, b in zip(first.scores, second.scores)]
    signed = [gap if weight > 0 else -gap for gap, weight in zip(gaps, weights)]
    votes = sum((gap > 0) - (gap < 0) for gap in signed)
    margin = sum(weight * gap for weight, gap in zip(weights, gaps)) if label == "sum" else statistics.median(signed)
    direction = margin if label == "sum" else votes
    if direction == 0:
        return None
    if direction < 0:
        first, second, gaps, signed, margin = second, first, [-gap for gap in gaps], [-gap for gap in signed], -margin
    agreement = sum(gap > 0 for gap in signed) / len(signed)
    heldout = None if first.heldout is None or second.heldout is None else first.heldout - second.heldout
    return Pair(first.image, second.image, first.prompt, margin, agreement, tuple(gaps), heldout, margin)


def without_repeats(
    pairs: Iterable[tuple[Scored, Scored]], keep_labels: bool, dropped: Counter[str]
) -> tuple[list[tuple[Scored, Scored]], list[tuple[Scored, Scored]]]:
    """The pairs of equal images and prompt once, the first of each; and those that are labelled both ways, once each.

    keep_labels: these have no label, and are not among the first.
    """
    found: dict[tuple[frozenset[str], str], list[tuple[Scored, Scored]]] = {}
    contents: dict[ImageSource, str] = {}
    for pair in pairs:
        for one in pair:
            contents.setdefault(one.image, content_hash(one.image))
        found.setdefault((frozenset(contents[one.image] for one in pair), pair[0].prompt), []).append(pair)
    both = [same[0] for same in found.values() if len({contents[better.image] for better, _ in same}) > 1]
    again = sum(len(same) for same in found.values()) - len(found) - (len(both) if keep_labels else 0)
    if again:
        dropped["pairs given again"] += again
    if both and keep_labels:
        dropped["pairs labelled both ways"] += len(both)
    return [same[0] for same in found.values() if not (keep_labels and same[0] in both)], both


def relabelled(
    pairs: Iterable[tuple[Scored, Scored]], weights: Sequence[float], label: Label | None, dropped: Counter[str]
) -> Iterator[Pair]:
    """Pairs that exist, the better image first, with margins and agreement; by a `label` with a new better image, by None with the old one.

    A margin that contradicts the label is negative, which no filter keeps.
    """
    for better, worse in pairs:
        pair = labelled(better, worse, weights, label or "sum")
        if pair is None:
            dropped[WITHOUT[label or "sum"]] += 1
        elif label is None and pair.chosen is not better.image:
            yield _swapped(pair, weights)
        else:
            yield pair


def _swapped(pair: Pair, weights: Sequence[float]) -> Pair:
    """The same two images with the other one as the better."""
    gaps = tuple(-gap for gap in pair.gaps)
    agreement = sum(gap * weight > 0 for gap, weight in zip(gaps, weights)) / len(gaps)
    margin, heldout = -(pair.margin or 0.0), None if pair.heldout is None else -pair.heldout
    return Pair(pair.rejected, pair.chosen, pair.prompt, margin, agreement, gaps, heldout, margin)
