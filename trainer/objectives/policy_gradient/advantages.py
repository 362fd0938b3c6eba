"""From scores to advantages: how much better an image is than what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Baseline = Literal["group", "group-mean", "round", "history"]
HISTORY = 16  # DDPO's per-prompt buffer, and the number of scores from which it is used
LEAST = 1e-6  # DDPO's code: added to a standard deviation


def equal(scores: Tensor) -> Tensor:
    """Whether all scores of a group are equal but for rounding: (…,G) -> (…)."""
    spread = scores.amax(-1) - scores.amin(-1)
    return spread <= 1e-6 * scores.abs().amax(-1)


def group_advantages(scores: Tensor, baseline: Baseline, least: float = LEAST) -> Tensor:
    """Advantages of scores (P,G) of P prompts with G images each; 0 where the compared scores are equal but for rounding.

    group: (r − mean)/std over the images of a prompt (GRPO, arXiv:2402.03300). group-mean: the mean of a prompt, the standard
    deviation of all (Flow-GRPO's `global_std`). round: both of all (DDPO without tracking). Standard deviations are of the population.
    """
    mean, std = scores.mean(1, keepdim=True), scores.std(1, keepdim=True, correction=0)
    if baseline != "group":
        std = scores.std(correction=0).expand_as(std)
    if baseline == "round":
        return torch.where(equal(scores.flatten()), 0.0, (scores - scores.mean()) / (std + least))
    return torch.where(equal(scores)[:, None], 0.0, (scores - mean) / (std + least))


class History:
    """The last scores of each prompt (DDPO, arXiv:2305.13301, appendix; ddpo-pytorch's PerPromptStatTracker)."""

    def __init__(self, size: int = HISTORY) -> None:
        self.size = size
        self.scores: dict[str, list[float]] = {}

    def advantages(self, prompts: Sequence[str], scores: Tensor) -> Tensor:
        """Advantages (N,) of scores (N,), by the mean and standard deviation of the prompt's last `size` scores, these included.

        A prompt with fewer scores takes those of all N. Equal scores, but for rounding, give 0.
        """
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            self.scores[prompt] = [*self.scores.get(prompt, []), score][-self.size :]
        known = {prompt: torch.tensor(self.scores[prompt], dtype=scores.dtype) for prompt in dict.fromkeys(prompts)}
        compared = [known[prompt] if len(known[prompt]) == self.size else scores for prompt in prompts]
        mean = torch.stack([values.mean() for values in compared])
        found = (scores - mean) / (torch.stack([values.std(correction=0) for values in compared]) + LEAST)
        return torch.where(torch.stack([equal(values) for values in compared]), 0.0, found)


def above_auxiliaries(scores: Tensor, auxiliaries: Tensor, share: float) -> Tensor:
    """Which of N images a reward ranks above what other rewards do (GARDO, arXiv:2512.24138): scores (N,), auxiliaries (N,R) -> (N,) bool.

    An image's excess is its rank by the reward less the mean of its ranks by the auxiliary ones, 0 the worst; equal scores share the mean
    of their ranks. Of positive excesses the highest `share` is taken: signs of exploitation. The released code counts ranks from the best
    one, which takes the opposite images.
    """

    def ranks(values: Tensor) -> Tensor:
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts + 1) / 2)[place].double()

    excess = ranks(scores) - sum(ranks(column) for column in auxiliaries.T) / max(1, auxiliaries.shape[1])
    positive = excess[excess > 0]
    if len(positive) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return excess >= positive.quantile(1 - share)


def relative_distances(features: Tensor) -> Tensor:
    """Cosine distance of each image to the nearest of its group, over its mean in the group: features (P,G,D) -> (P,G); GARDO's weight."""
    unit = F.normalize(features.double(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2) + 3 * torch.eye(features.shape[1], dtype=torch.float64)  # no image is its own neighbour
    nearest = distance.amin(-1).clamp(min=0)
    mean = nearest.mean(1, keepdim=True)
    return torch.where(mean > 1e-6, nearest / mean.clamp(min=1e-6), 1.0)  # equal images: 1
