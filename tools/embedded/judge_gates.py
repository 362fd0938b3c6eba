"""Gates of the judges: do the rewards see the rater's taste, and does the diversity extractor leave the finish alone?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.demo import rater, world
from trainer.metrics.diversity import within_prompt_diversity

from .preference import FLIPS, RATERS

FIXED_FINISH = {"edge": "crisp", "tone": "vivid", "light": "shaded"}
FIXED_LAYOUT = {"size": "large", "position": "centre", "background": "black"}


@torch.no_grad()
def reward_gates(scores: Mapping[str, Tensor], images: Tensor, prompts: Sequence[str], gold: rater.Gold) -> dict[str, Any]:
    """Raw scores (P·n,) of each tower on n images of each of P prompts, against the raters and the parts of their taste.

    Correlations are within a prompt: of deviations from the prompt's mean, over all images. `parts` are plain correlations, which the
    utility itself bounds (`gold itself`); `alone` are partial ones, the other parts held fixed, of which the utility itself has 1.
    """
    pieces = list(zip(images.split(256), (list(prompts[i : i + 256]) for i in range(0, len(prompts), 256))))
    measured = [{**rater.measure(piece), "match": rater.match(gold.read(piece), texts)} for piece, texts in pieces]
    parts = {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
    each = prompts.count(prompts[0])
    worth = {name: sum(weights[part] * values for part, values in parts.items()) for name, weights in RATERS.items()}
    liked = {part: values if rater.WEIGHTS[part] > 0 else -values for part, values in parts.items()}
    found: dict[str, Any] = {}
    for name, score in scores.items():
        gaps, own = _gaps(score, each), _gaps(worth[name], each)
        truth = (1 - FLIPS) * torch.sigmoid(own) + FLIPS / 2
        found[name] = {
            "agreement with the rater": float((gaps.sign() == _gaps(worth["heldout"], each).sign()).double().mean()),
            "correlation with gold": _correlation(score, worth["heldout"], each),
            "correlation with its own rater": _correlation(score, worth[name], each),
            "above Bayes": float(F.binary_cross_entropy_with_logits(gaps, truth) - F.binary_cross_entropy(truth, truth)),
            "parts": {part: _correlation(score, values, each) for part, values in liked.items()},
            "alone": _partial(score, liked, each),
        }
    return {
        **found,
        "gold itself": {part: _correlation(worth["heldout"], values, each) for part, values in liked.items()},
        "crowd–gold": _correlation(worth["proxy"], worth["heldout"], each),
    }


def _within(values: Tensor, each: int) -> Tensor:
    table = values.double().reshape(-1, each)
    return (table - table.mean(1, keepdim=True)).flatten()


def _correlation(a: Tensor, b: Tensor, each: int) -> float:
    return float(torch.stack([_within(a, each), _within(b, each)]).corrcoef()[0, 1])


def _partial(score: Tensor, parts: Mapping[str, Tensor], each: int) -> dict[str, float]:
    """Correlation of the score with each part after a linear fit of the other parts is taken from both."""
    columns = {name: _within(values, each) for name, values in parts.items()}
    target, found = _within(score, each), dict[str, float]()
    for name, column in columns.items():
        others = torch.stack([values for other, values in columns.items() if other != name], 1)
        both = torch.stack([target, column], 1)
        left = both - others @ torch.linalg.lstsq(others, both).solution
        found[name] = float(left.T.corrcoef()[0, 1])
    return found


def _gaps(values: Tensor, each: int) -> Tensor:
    """Differences in all pairs of images of one prompt."""
    first, second = torch.combinations(torch.arange(each)).unbind(1)
    table = values.double().reshape(-1, each)
    return (table[:, first] - table[:, second]).flatten()


@torch.no_grad()
def extractor_gates(features: Callable[[Tensor], Tensor], captions: Sequence[world.Caption], per_prompt: int = 16) -> dict[str, float]:
    """Diversity of perfect renders whose unnamed finish, layout or both are fixed, as a share of the diversity of free ones."""
    groups = torch.arange(len(captions)).repeat_interleave(per_prompt)

    def diversity(fixed: Mapping[str, str]) -> float:
        narrowed = [world.Caption(c.text, {**fixed, **c.named}) for c in captions]
        images = world.real_renders(narrowed, per_prompt, 5)
        return float(within_prompt_diversity(torch.cat([features(part) for part in images.split(64)]), groups).mean())

    free = diversity({})
    fixed = {"finish": FIXED_FINISH, "layout": FIXED_LAYOUT, "both": {**FIXED_FINISH, **FIXED_LAYOUT}}
    return {name: diversity(values) / free for name, values in fixed.items()}
