"""Distances between two sets of features: Fréchet (FID), kernel (KID) and log-covariance, streaming where sufficient statistics exist."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features that come in batches (Chan, Golub and LeVeque 1979): any number of images, one D×D matrix."""

    def __init__(self) -> None:
        self.number = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    @staticmethod
    def of(batches: Iterable[Tensor]) -> Moments:
        """Of features (N,D) in batches."""
        moments = Moments()
        for features in batches:
            moments.update(features)
        return moments

    def update(self, features: Tensor) -> Moments:
        """Add features (N,D)."""
        if features.ndim != 2:
            raise ValueError(f"features of shape {tuple(features.shape)}: give rows (N,D)")
        features = features.detach().cpu().double()  # MPS has no float64
        if len(features):
            mean = features.mean(0)
            self._add(len(features), mean, (features - mean).T @ (features - mean))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the rows of another."""
        if other.number:
            self._add(other.number, other._mean, other._scatter)
        return self

    def _add(self, number: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.number:
            self._mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        total = self.number + number
        change = mean - self._mean
        self._scatter = self._scatter + scatter + change.outer(change) * (self.number * number / total)
        self._mean = self._mean + change * (number / total)
        self.number = total

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._enough()
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(D,D) float64, over N−1."""
        self._enough()
        return self._scatter / (self.number - 1)

    def _enough(self) -> None:
        if self.number < 2:
            raise ValueError(f"{self.number} rows of features: give at least two rows (N,D)")


def _psd_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """‖μa−μb‖² + tr(Ca + Cb − 2(Ca^½ Cb Ca^½)^½) of features (N,D) and (M,D) (FID, Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""
    a, b = (x if isinstance(x, Moments) else Moments().update(x) for x in (a, b))
    root = _psd_sqrt(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def log_covariance_distance(a: Tensor | Moments, b: Tensor | Moments, ridge: float = 1e-3) -> float:
    """‖log(Ca+λI) − log(Cb+λI)‖_F of unit-normalised features (N,D), (M,D), with λ = ridge · mean eigenvalue of Cb.

    Our reading of the paper's LogCovDistance, whose formula is not published: comparable between our own tables only.
    Moments must be of features that were normalised before.
    """
    cov_a, cov_b = (
        (x if isinstance(x, Moments) else Moments().update(torch.nn.functional.normalize(x.cpu().double(), dim=1))).covariance
        for x in (a, b)
    )
    ridged = ridge * cov_b.trace() / len(cov_b) * torch.eye(len(cov_b), dtype=torch.float64)
    logs: list[Tensor] = []
    for cov in (cov_a, cov_b):
        values, vectors = torch.linalg.eigh(cov + ridged)
        logs.append((vectors * values.clamp(min=1e-30).log()) @ vectors.T)
    return float((logs[0] - logs[1]).norm())


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """MMD² of rows (N,D) and (M,D) with the kernel (x·y/D + 1)³ (KID, Bińkowski et al. 2018, arXiv:1801.01401, section 4).

    The estimator is unbiased and can be negative.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: give at least two rows (N,D) of one width")
    a, b = a.cpu().double(), b.cpu().double()
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (_cubic(a, a), _cubic(b, b))]
    return float(within[0] + within[1] - 2 * _cubic(a, b).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class Reservoir:
    """A uniform sample of at most `size` rows of a stream (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, rng: torch.Generator) -> None:
        self.size, self.rng, self.seen = size, rng, 0
        self._rows: list[Tensor] = []

    def update(self, features: Tensor) -> Reservoir:
        """Add features (N,D)."""
        for row in features.detach().cpu():
            self.seen += 1
            if len(self._rows) < self.size:
                self._rows.append(row.clone())
            else:
                place = int(torch.randint(self.seen, (1,), generator=self.rng))
                if place < self.size:
                    self._rows[place] = row.clone()
        return self

    @property
    def rows(self) -> Tensor:
        """(min(size, seen), D)."""
        return torch.stack(self._rows)
