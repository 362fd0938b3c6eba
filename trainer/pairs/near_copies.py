"""Images that are nearly the same: other encodings or sizes of one image, or renders that differ in little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.images import ImageSource, load

SIDE = 16


class Thumbnails:
    """Images as SIDE×SIDE averages, each decoded once."""

    def __init__(self) -> None:
        self._known: dict[ImageSource, Tensor] = {}

    def __getitem__(self, image: ImageSource) -> Tensor:
        """(3·SIDE²,) in [0,1] of the centre square."""
        if image not in self._known:
            self._known[image] = F.adaptive_avg_pool2d(load(image, 4 * SIDE), SIDE).flatten()
        return self._known[image]

    def distance(self, one: ImageSource, other: ImageSource) -> float:
        """Root mean square of the difference, 0 to 1."""
        return float((self[one] - self[other]).square().mean().sqrt())

    def near(self, images: Sequence[ImageSource], distance: float) -> Iterable[tuple[int, int]]:
        """Every two of the images, by their places, that are no farther apart than `distance`.

        Means differ by no more than the images do: only those of about one mean are compared.
        """
        if not images:
            return
        all_of_them = torch.stack([self[image] for image in images])
        means, order = all_of_them.double().mean(1).sort()
        ends = torch.searchsorted(means, means + distance + 1e-6, right=True).tolist()
        for place, end in enumerate(ends):
            there = order[place + 1 : end]
            gaps = (all_of_them[there] - all_of_them[order[place]]).square().mean(1).sqrt()
            for other in there[gaps <= distance].tolist():
                yield int(order[place]), other
