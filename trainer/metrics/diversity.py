"""How different the images of one prompt are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def within_prompt_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """1 − mean cosine over the pairs of images that share a prompt (DinoDiversity's formula, ImageReFL's evaluation code).

    features (N,D); groups (N,) prompt ids in any order. Returns one value per distinct id, in ascending order.
    """
    if len(features) != len(groups):
        raise ValueError(f"{len(features)} features for {len(groups)} prompt ids")
    unit = F.normalize(features.double(), dim=1)
    values: list[Tensor] = []
    for group in groups.unique(sorted=True):
        rows = unit[groups == group]
        n = len(rows)
        if n < 2:
            raise ValueError(f"prompt {int(group)} has {n} image: diversity needs at least two")
        # Σ over ordered pairs of cosines = ‖Σ u‖² − n
        values.append(1 - (rows.sum(0).square().sum() - n) / (n * (n - 1)))
    return torch.stack(values)
