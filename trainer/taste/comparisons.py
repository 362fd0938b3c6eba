"""Choices of any kind as comparisons of two images of one prompt: what a head is fitted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path

from ..data.choices import Choice, is_choices, read_choices
from ..data.images import ImageSource, open_image
from ..data.preferences import read_pairs
from ..data.report import Report
from .choices import pixel_hash
from .folds import Keys, plain

FEWEST = 8


@dataclass(frozen=True)
class Image:
    """An encoded image, and the hash by which copies are one."""

    path: ImageSource
    sha256: str


@dataclass(frozen=True)
class Comparison:
    """`better` was preferred to `worse` under a prompt, or tied with it."""

    better: Image
    worse: Image
    prompt: str
    tie: bool = False
    person: str = ""
    weight: float = 1.0
    """Fewer than 1 where several comparisons say what one judgement said."""
    asked: bool = False
    """Whether the pair was chosen for what its answer would say: it is learnt from, and agreement on it is not that on other pairs."""

    @property
    def keys(self) -> Keys:
        """For folds."""
        return Keys(self.prompt, (self.better.sha256, self.worse.sha256))


@dataclass
class Gathered:
    """The comparisons of some files, and what was seen on the way."""

    comparisons: list[Comparison] = field(default_factory=list[Comparison])
    places: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])
    """Of each choice whose images stood beside each other: the place of the chosen one, from 0, their number, and who chose."""
    skipped: int = 0
    thumbs: Counter[str] = field(default_factory=Counter[str])
    """By person."""
    alone: Counter[str] = field(default_factory=Counter[str])
    """Thumbs of prompts whose images are all liked or all disliked: they say something of the prompt, nothing of its images."""
    notes: list[str] = field(default_factory=list[str])

    @property
    def people(self) -> list[str]:
        """Who judged."""
        return sorted({one.person for one in self.comparisons})

    @property
    def choices(self) -> int:
        """How many choices the comparisons are: one that was made again and again counts once, ties do not count."""
        return round(sum(one.weight for one in once(self.comparisons) if not one.tie))

    def of(self, person: str) -> Gathered:
        """What one person chose."""
        comparisons, places = [one for one in self.comparisons if one.person == person], [one for one in self.places if one[2] == person]
        mine = lambda counts: Counter({person: counts[person]})  # noqa: E731
        return Gathered(comparisons, places, self.skipped, mine(self.thumbs), mine(self.alone), self.notes)


def gather(paths: Sequence[Path], fewest: int = FEWEST, asked: Sequence[Path] = ()) -> Gathered:
    """Files of choices, and tables or folders of pairs. Damaged lines are noted and left out.

    asked: further files, of pairs that `active` chose. A choice that is in several files counts once, and not at all where one of them
    takes it back.

    Raises ValueError in one line where they give fewer than `fewest` comparisons, or all choices are on one side.
    """
    found = Gathered()
    paths = list(dict.fromkeys([*asked, *paths]))
    read = {path: read_choices(path) for path in paths if is_choices(path)}
    counted = {name for one in read.values() for name in one.ids - {record.id for record in one.records}}  # undone
    for path in paths:
        before = len(found.comparisons)
        if path in read:
            if read[path].cut:
                found.notes.append(read[path].cut_text())
            _add(found, [one for one in read[path].records if one.id not in counted], path)
            counted |= read[path].ids
        else:
            _add_table(found, path)
        if path in asked:
            found.comparisons[before:] = [replace(one, asked=True) for one in found.comparisons[before:]]
    found.comparisons.sort(key=lambda one: (plain(one.prompt), one.better.sha256, one.worse.sha256, one.person))  # of lines in any order
    _check(found, ", ".join(map(str, paths)), fewest)
    return found


def once(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With weights by which a pair that one person judged again and again under one prompt counts as one."""
    named = [(one.person, plain(one.prompt), frozenset((one.better.sha256, one.worse.sha256))) for one in comparisons]
    times = Counter(named)
    return [replace(one, weight=one.weight / times[name]) for one, name in zip(comparisons, named)]


def of_pairs(pairs: Sequence[tuple[ImageSource, ImageSource, str]], source: str) -> Gathered:
    """Better and worse image and prompt of each pair; ValueError as of `gather`."""
    found = Gathered(_paired(pairs, source))
    _check(found, source, FEWEST)
    return found


def _add_table(found: Gathered, path: Path) -> None:
    report = Report()
    found.comparisons += _paired(read_pairs(str(path), report), str(path))
    found.notes.append(str(report))


def _paired(pairs: Sequence[tuple[ImageSource, ImageSource, str]], source: str) -> list[Comparison]:
    found: list[Comparison] = []
    hashes: dict[ImageSource, str] = {}
    for better, worse, prompt in pairs:
        for image in (better, worse):
            if image not in hashes:
                hashes[image] = pixel_hash(open_image(image))  # as files of choices have it: copies with other metadata are one image
        if hashes[better] == hashes[worse]:
            raise ValueError(f"{source}: {better} and {worse} are the same image: a choice is between two")
        found.append(Comparison(Image(better, hashes[better]), Image(worse, hashes[worse]), prompt))
    return found


def _add(found: Gathered, records: Sequence[Choice], path: Path) -> None:
    likes: dict[tuple[str, str, str], tuple[Image, bool]] = {}  # the last word on an image counts
    same = set[tuple[Path, str]]()  # files, and the images that they were found to hold
    for one in records:
        images = [Image(shown.file, shown.sha256) for shown in one.images]
        if one.outcome == "skip":
            found.skipped += 1
            continue
        gone = next((shown.file for shown in one.images if not shown.file.is_file()), None)
        if gone is not None:
            raise ValueError(f"{path}, line {one.line} names {gone}, which does not exist: put it back, or remove the line")
        for shown in one.images:
            if (shown.file, shown.sha256) not in same and pixel_hash(open_image(shown.file)) != shown.sha256:
                raise ValueError(
                    f"{path}, line {one.line}: {shown.file} is not the image that was shown: put that back, or remove the line"
                )
            same.add((shown.file, shown.sha256))
        if one.kind == "thumb":
            found.thumbs[one.person] += 1
            likes[one.person, plain(one.prompt), images[0].sha256] = (images[0], one.outcome == "liked")
        elif one.chosen is None:
            ties = list(combinations(images, 2))
            weight = (len(images) - 1) / len(ties)
            found.comparisons += [Comparison(a, b, one.prompt, True, one.person, weight) for a, b in ties]
        else:
            found.places.append((one.order.index(one.chosen), len(images), one.person))
            better = images[one.chosen]
            found.comparisons += [Comparison(better, other, one.prompt, False, one.person) for other in images if other is not better]
    _add_likes(found, likes)


def _add_likes(found: Gathered, likes: dict[tuple[str, str, str], tuple[Image, bool]]) -> None:
    """Each liked image is preferred to each disliked one of its prompt; n judged images weigh as n − 1 choices, as a best of n does."""
    groups: dict[tuple[str, str], tuple[list[Image], list[Image]]] = {}
    for (person, prompt, _), (image, liked) in likes.items():
        groups.setdefault((person, prompt), ([], []))[not liked].append(image)
    for (person, prompt), (liked, disliked) in groups.items():
        if not liked or not disliked:
            found.alone[person] += len(liked) + len(disliked)
            continue
        weight = (len(liked) + len(disliked) - 1) / (len(liked) * len(disliked))
        found.comparisons += [Comparison(a, b, prompt, False, person, weight) for a, b in product(liked, disliked)]


def _check(found: Gathered, source: str, fewest: int) -> None:
    sides = Counter((place == 0, place == number - 1) for place, number, _ in found.places)
    if found.alone and not found.comparisons:
        raise ValueError(
            f"{source}: {found.alone.total()} images are judged, and under no prompt are some liked and others disliked: this would teach "
            "the prompts alone; judge several images of one prompt"
        )
    if len(found.places) >= FEWEST and len(sides) == 1 and (side := next(iter(sides))) in ((True, False), (False, True)):
        raise ValueError(
            f"{source}: all {len(found.places)} choices are the image shown {'first' if side[0] else 'last'}: that is a place, not a taste"
        )
    number, ties = found.choices, sum(one.tie for one in found.comparisons)
    if number < fewest:
        more = f" ({found.skipped} skipped, {ties} ties)" if found.skipped or ties else ""
        raise ValueError(f"{source} has {number} choices between two images{more}: give at least {fewest}, better 30")
