"""Pairs for training and held-out ones that share no prompt and no image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..data.images import ImageSource
from ..rng import seed_of
from ..text import counted
from .label import Pair
from .near_copies import Thumbnails

_FEW = 256  # groups of which the best sum is found; of more the first that fit come near enough


def split(pairs: Sequence[Pair], share: float, seed: int, thumbnails: Thumbnails, near_copies: float) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; `share` of all are held out, or as near to it as whole groups come, at least one pair.

    Pairs are in one group where their prompts are equal but for case and blanks, or where images of theirs are near-copies, and through
    other pairs too. Groups come in an order that the seed and their prompts decide. ValueError where they allow no split.
    """
    if not share:
        return list(pairs), []
    groups = _groups(pairs, thumbnails, near_copies)
    sizes, names = Counter(groups), dict[int, str]()
    for pair, group in zip(pairs, groups):
        names[group] = min(names.get(group, _plain(pair.prompt)), _plain(pair.prompt))
    wanted, held, number = max(1, round(share * len(pairs))), set[int](), 0
    order = sorted(sizes, key=lambda group: seed_of(seed, "split", names[group]))
    for group in order:
        if number + sizes[group] <= wanted:
            held.add(group)
            number += sizes[group]
    if number != wanted and len(order) <= _FEW:
        held = _nearest({group: sizes[group] for group in order}, wanted, min(2 * wanted, len(pairs) - 1))
    if not held or number == len(pairs):
        raise ValueError(
            f"--split: {counted(len(pairs), 'pairs')} in {counted(len(sizes), 'groups')} that share prompts or near-copies of images, the "
            f"smallest of {min(sizes.values(), default=0)}: {wanted} cannot be held out; give more prompts, another share, or 0 for none"
        )
    return [p for p, g in zip(pairs, groups) if g not in held], [p for p, g in zip(pairs, groups) if g in held]


def _nearest(sizes: Mapping[int, int], wanted: int, most: int) -> set[int]:
    """The groups whose sizes sum to as near to `wanted` as any do, from 1 to `most`; of equally near sums the lower; or none."""
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for group, size in sizes.items():
        for total, groups in list(reached.items()):
            if total + size <= most:
                reached.setdefault(total + size, (*groups, group))
    del reached[0]
    return set(reached[min(reached, key=lambda total: (abs(total - wanted), total))]) if reached else set()


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _groups(pairs: Sequence[Pair], thumbnails: Thumbnails, near_copies: float) -> list[int]:
    """The group of each pair, as the place of its first pair."""
    parents = list(range(len(pairs)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parents[high] = low

    by_prompt, by_image = dict[str, int](), dict[ImageSource, int]()
    for i, pair in enumerate(pairs):
        join(i, by_prompt.setdefault(_plain(pair.prompt), i))
        for image in (pair.chosen, pair.rejected):
            join(i, by_image.setdefault(image, i))
    images = list(by_image)
    for one, other in thumbnails.near(images, near_copies):
        join(by_image[images[one]], by_image[images[other]])
    return [root(i) for i in range(len(pairs))]
