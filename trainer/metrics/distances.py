"""Distances between two sets of features: Fréchet and log-covariance."""

from __future__ import annotations

import torch
from torch import Tensor


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: give at least two rows (N,D)")
    features = features.double()
    return features.mean(0), features.T.cov()


def _psd_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μa−μb‖² + tr(Ca + Cb − 2(Ca^½ Cb Ca^½)^½) of features (N,D) and (M,D) (FID, Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""
    mean_a, cov_a = _moments(a)
    mean_b, cov_b = _moments(b)
    root = _psd_sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def log_covariance_distance(a: Tensor, b: Tensor, ridge: float = 1e-3) -> float:
    """‖log(Ca+λI) − log(Cb+λI)‖_F of unit-normalised features (N,D), (M,D), with λ = ridge · mean eigenvalue of Cb.

    Our reading of the paper's LogCovDistance, whose formula is not published: comparable between our own tables only.
    """
    cov_a, cov_b = (_moments(torch.nn.functional.normalize(x, dim=1))[1] for x in (a, b))
    ridged = ridge * cov_b.trace() / len(cov_b) * torch.eye(len(cov_b), dtype=torch.float64)
    logs: list[Tensor] = []
    for cov in (cov_a, cov_b):
        values, vectors = torch.linalg.eigh(cov + ridged)
        logs.append((vectors * values.clamp(min=1e-30).log()) @ vectors.T)
    return float((logs[0] - logs[1]).norm())
