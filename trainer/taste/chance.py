"""How far agreement gets by chance: the distribution of cross-validated agreement when the choices have nothing to do with the images.

Then the features of images that were judged under the same prompts are exchangeable, whatever ties the choices together: tosses, a
ranking of reused images, a best of n. So features are permuted among them and cross-validation is repeated; the share of permutations that
do as well is a p-value (Fisher 1935; Phipson and Smyth 2010). Of pairs without a common image a permutation turns some round.

It would be exact if permuted heads were fitted as the real one, which takes Newton's method to its end and λ inside each fold. A
permutation's are fitted by one Newton step from the tower, which has a closed form for all folds and λ (ridge regression on working
responses); the λ of each fold is the one that is best for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rng import generator
from .head import PRECISIONS, Design, Features, Fold, best_without

MANY, SOME = 199, 99  # permutations up to 200 and up to LARGEST choices
LARGEST = 400
CHUNK = 1 << 21  # elements of the kernels of the permutations that are computed together
INFLATION = 1 + 2 / math.pi
"""Variance of cross-validated agreement over the binomial one, of n independent choices by chance: two held-out margins share the product
of their outcomes, which correlates them by 1/n and their signs by 2/π of it."""


def exchangeable(images: Sequence[str], prompts: Sequence[str]) -> list[list[list[int]]]:
    """Of rows (an image under a prompt): sets of images that were judged under the same prompts, each image as its rows in their order."""
    rows: dict[str, dict[str, int]] = {}
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        rows.setdefault(image, {})[prompt] = i
    sets: dict[tuple[str, ...], list[list[int]]] = {}
    for one in rows.values():
        under = tuple(sorted(one))
        sets.setdefault(under, []).append([one[prompt] for prompt in under])
    return list(sets.values())


def permutations(sets: Sequence[Sequence[Sequence[int]]], rows: int, choices: int) -> Tensor:
    """(B,rows) int64: the row whose features each row gets; B = MANY, or SOME of many choices."""
    found, rng = torch.arange(rows).repeat(MANY if choices <= 200 else SOME, 1), generator("chance")
    for images in sets:
        at = torch.tensor(images)
        order = torch.rand(len(found), len(images), generator=rng).argsort(1)
        found[:, at.flatten()] = at[order].flatten(1)
    return found


class Chance:
    """Cross-validation with permuted features. better, worse: (n,) rows of features; counted (n,) bool: whose agreement is meant."""

    def __init__(self, features: Features, better: Tensor, worse: Tensor, design: Design, folds: Sequence[Fold], counted: Tensor) -> None:
        self.score, self.better, self.worse, self.folds = features.score, better, worse, folds
        self.outcome, self.weight = design.outcome, design.weight
        self.share = torch.where(counted & (self.outcome != 0.5), self.weight, 0.0)
        self.share = self.share / self.share.sum()
        self.grams = [block @ block.T for block in features.blocks()]

    def agreement(self, rows: Tensor) -> Tensor:
        """(B,2) of the head and of the tower alone, where in permutation b row i has the features of row rows[b,i]."""
        step = max(1, CHUNK // len(self.weight) ** 2)
        return torch.cat([self._agreement(part) for part in rows.split(step)])

    def _agreement(self, rows: Tensor) -> Tensor:
        b, w = rows[:, self.better], rows[:, self.worse]
        at = lambda gram, x, y: gram[x[:, :, None], y[:, None]]  # noqa: E731
        blocks = [at(g, b, b) - at(g, b, w) - at(g, w, b) + at(g, w, w) for g in self.grams]
        scales = [block.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) for block in blocks]  # τ²
        kernel = torch.stack([block / scale[:, None, None] for block, scale in zip(blocks, scales)]).sum(0)
        offset = (self.score[b] - self.score[w]) / scales[0].sqrt()[:, None]
        held = self.held_out(kernel, offset)
        chosen = held.gather(2, best_without(self.losses(held), self.folds)[:, :, None])[:, :, 0]
        return torch.stack([self._right(chosen) @ self.share, self._right(offset) @ self.share], 1)

    def held_out(self, kernel: Tensor, offset: Tensor) -> Tensor:
        """kernel (B,n,n), offset (B,n) -> logits (B,n,L) of each row by heads without its fold, one Newton step from the tower.

        With weights v = w·p(1 − p) at the tower's chances p and responses z = w·(y − p)/√v, the step is ridge regression of z on rows times
        √v. Its residuals without the rows E are (I − H_EE)⁻¹(z − Hz)_E, H the hat matrix of all.
        """
        chance = torch.sigmoid(offset)
        root = (self.weight * chance * (1 - chance)).clamp(min=1e-12).sqrt()
        z = self.weight * (self.outcome - chance) / root
        sizes, vectors = torch.linalg.eigh(root[:, :, None] * kernel * root[:, None])
        sizes, along = sizes.clamp(min=0), (vectors.mT @ z[:, :, None])
        held = offset[:, :, None].repeat(1, 1, len(PRECISIONS))
        outside: list[tuple[Tensor, Tensor, Tensor]] = []
        for train, test in self.folds:
            out = torch.ones(z.shape[1], dtype=torch.bool)
            out[train] = False
            left = out.nonzero()[:, 0]
            outside.append((left, test, torch.searchsorted(left, test)))
        for column, precision in enumerate(PRECISIONS):
            if math.isinf(precision):
                continue
            shrink = (sizes / (sizes + precision))[:, :, None]
            residual = z - (vectors @ (shrink * along))[:, :, 0]
            for left, test, at in outside:
                part = vectors[:, left]
                hat = part @ (shrink * part.mT)
                without = torch.linalg.solve(torch.eye(len(left), dtype=hat.dtype) - hat, residual[:, left])
                held[:, test, column] += (z[:, test] - without[:, at]) / root[:, test]
        return held

    def losses(self, held: Tensor) -> Tensor:
        """Weighted cross-entropies of logits (B,n,L)."""
        return self.weight[:, None] * (F.softplus(held) - self.outcome[:, None] * held)

    def _right(self, logits: Tensor) -> Tensor:
        return (logits > 0).double() + (logits == 0).double() / 2
