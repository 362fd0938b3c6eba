"""Diversity of the images of one prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def within_prompt_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """1 − mean cosine over the pairs of images that share a prompt (DinoDiversity's formula, ImageReFL's evaluation code).

    features (N,D); groups (N,) prompt ids in any order. Returns one value per distinct id, in ascending order.
    """
    if len(features) != len(groups):
        raise ValueError(f"{len(features)} features for {len(groups)} prompt ids")
    streamed = Diversity().update(features, groups.tolist()).values()
    return torch.stack([streamed[int(g)] for g in groups.unique(sorted=True)])


class Diversity:
    """`within_prompt_diversity` of features that come in batches, in any order, from one sum of unit vectors per prompt.

    Σ over ordered pairs of 1 − cosine = M² − ‖Σu‖² over M images. An image that does not count takes part in no pair, and the
    number of pairs stays n(n−1): broken images lower the diversity instead of raising it.
    """

    def __init__(self) -> None:
        self._sums: dict[Hashable, tuple[int, float, Tensor]] = {}

    def update(self, features: Tensor, groups: Sequence[Hashable], counts: Tensor | None = None) -> Diversity:
        """Add features (N,D), the prompt id of each, and which of them count: (N,) of 0 and 1, by default all."""
        if len(features) != len(groups):
            raise ValueError(f"{len(features)} features for {len(groups)} prompt ids")
        counted = torch.ones(len(features)) if counts is None else counts.cpu()
        units = F.normalize(features.detach().cpu().double(), dim=1) * counted[:, None]
        for group, unit, one in zip(groups, units, counted.tolist()):
            number, right, total = self._sums.get(group, (0, 0.0, torch.zeros_like(unit)))
            self._sums[group] = (number + 1, right + one, total + unit)
        return self

    def values(self) -> dict[Hashable, Tensor]:
        """Prompt id -> diversity (), in the order in which prompts came."""
        for group, (n, _, _) in self._sums.items():
            if n < 2:
                raise ValueError(f"prompt {group} has {n} image: diversity needs at least two")
        return {group: (m * m - total.square().sum()) / (n * (n - 1)) for group, (n, m, total) in self._sums.items()}


def pairwise_diversity(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor, groups: Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """Mean distance over the pairs of images that share a prompt, as of LPIPS: images (N,…), `distance` of (P,…), (P,…) -> (P,)."""
    if len(images) != len(groups):
        raise ValueError(f"{len(images)} images for {len(groups)} prompt ids")
    values: dict[Hashable, Tensor] = {}
    for group in dict.fromkeys(groups):
        rows = images[[i for i, g in enumerate(groups) if g == group]]
        if len(rows) < 2:
            raise ValueError(f"prompt {group} has {len(rows)} image: diversity needs at least two")
        left, right = torch.combinations(torch.arange(len(rows))).unbind(1)
        values[group] = torch.cat([distance(rows[a], rows[b]) for a, b in zip(left.split(32), right.split(32))]).mean()
    return values


def vendi_score(features: Tensor) -> float:
    """exp(−Σ λ log λ) over the eigenvalues of the similarities K/n, K the cosines (Friedman and Dieng 2022, arXiv:2210.02410, eq. 3).

    features (N,D). The effective number of different images: 1 for copies, N for images at right angles.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features of shape {tuple(features.shape)}: give rows (N,D)")
    unit = F.normalize(features.cpu().double(), dim=1)
    smaller = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues except zeros
    values = torch.linalg.eigvalsh(smaller / len(unit)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())
