"""Random weights under which every part of a model shows in its score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every part of a model shows in its score: matrices keep variance, vectors vary by a tenth."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if name.endswith("logit_scale"):
                p.fill_(4.6)
            elif p.ndim < 2:
                p.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))  # norms' weights are about 1, all else about 0
            else:
                p.copy_(noise / p[0].numel() ** 0.5 if "embedding" not in name and "pos_embed" not in name else 0.3 * noise)
    return module.eval().requires_grad_(False)


def random_head(width: int, seed: int) -> dict[str, Tensor]:
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = randomise(nn.ModuleDict({str(i): nn.Linear(*size) for i, size in sizes.items()}), seed)
    return {f"layers.{k}": x.clone() for k, x in layers.state_dict().items()}


def apply_head(head: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for i in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    return x[:, 0]
