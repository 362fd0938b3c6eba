"""Folds for choices: the same image or prompt never stands on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from ..rng import seed_of
from .head import Fold

FOLDS, LEAST = 10, 5  # folds, and the fewest groups that make folds by themselves


@dataclass(frozen=True)
class Keys:
    """What a comparison must not share with those it is predicted from."""

    prompt: str
    images: tuple[Hashable, Hashable]

    @property
    def named_images(self) -> tuple[Hashable, ...]:
        """The images, in the form of `components`."""
        return tuple(("image", image) for image in self.images)

    @property
    def all(self) -> tuple[Hashable, ...]:
        """Prompt and images."""
        return (("prompt", plain(self.prompt)), *self.named_images)


def plain(prompt: str) -> str:
    """A prompt without what makes no other prompt: capitals and blanks."""
    return " ".join(prompt.casefold().split())


@dataclass(frozen=True)
class Folds:
    """`parts` of (rows to learn from, rows to test on)."""

    level: str
    """What the two sides do not share: `prompt and image`, `image` where there are too few prompts for it, or `pair`: then the images are
    connected through choices, each pair is left out alone, and so are, from what it is predicted by, all pairs that share an image."""
    groups: list[int]
    """The group of each comparison: the unit of intervals."""
    parts: list[Fold]


def folds(keys: Sequence[Keys], number: int = FOLDS, purpose: str = "taste", level: str | None = None) -> Folds:
    """Folds whose sides share no prompt and no image, or, where there are too few prompts, no image. Deterministic.

    level: what is not shared, where it should be that of other folds and there are two groups at least.
    """
    for unshared, named in (("prompt and image", [k.all for k in keys]), ("image", [k.named_images for k in keys])):
        groups = components(named)
        sizes = Counter(groups)
        enough = len(sizes) > 1 if level else len(sizes) >= LEAST and max(sizes.values()) <= len(keys) / 2
        if enough and level in (None, unshared):
            return Folds(unshared, groups, _parts(_dealt(groups, number, purpose), [k.named_images for k in keys]))
    alone = components([(frozenset(k.images),) for k in keys])  # a pair that is judged again and again is one
    return Folds("pair", alone, _parts(_dealt(alone, len(keys), purpose), [k.named_images for k in keys]))


def components(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """The connected component of each row, where rows that share a key are connected; named by the first row."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(keys):
        for key in row:
            low, high = sorted((root(i), root(first.setdefault(key, i))))
            parent[high] = low
    return [root(i) for i in range(len(keys))]


def _dealt(groups: Sequence[int], number: int, purpose: str) -> list[int]:
    """The fold of each row: groups in a fixed random order, each to the fold that has the fewest rows."""
    sizes = Counter(groups)
    number = min(number, len(sizes))
    held, fold = [0] * number, dict[int, int]()
    for group in sorted(sizes, key=lambda g: (-sizes[g], seed_of(purpose, g))):
        fold[group] = min(range(number), key=lambda f: (held[f], f))
        held[fold[group]] += sizes[group]
    return [fold[group] for group in groups]


def _parts(fold: Sequence[int], images: Sequence[Sequence[Hashable]]) -> list[Fold]:
    parts: list[Fold] = []
    for number in sorted(set(fold)):
        test = [i for i, f in enumerate(fold) if f == number]
        seen = {key for i in test for key in images[i]}
        train = [i for i, f in enumerate(fold) if f != number and seen.isdisjoint(images[i])]
        parts.append((torch.tensor(train, dtype=torch.long), torch.tensor(test, dtype=torch.long)))
    return parts
