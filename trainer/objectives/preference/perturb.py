"""Captions that no longer describe their image: one attribute, number, object or relation changed by rule, or given in a table."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ...data.manifest import PROMPT_COLUMNS
from ...data.report import Report
from ...data.rows import read_rows
from ...rng import seed_of

_CLASSES: tuple[tuple[str, ...], ...] = tuple(
    tuple(words.split())
    for words in (
        "red yellow green cyan blue purple white grey black brown",
        "one two three four five six",
        "cat dog horse bird cow sheep rabbit bear",
        "man woman", "boy girl", "men women", "boys girls", "king queen",
        "car bus train bicycle truck boat",
        "apple pear banana lemon strawberry",
        "table chair sofa bed",
        "house castle tower bridge",
        "tree flower bush",
        "forest desert beach city mountain",
        "cube sphere cone pyramid cylinder",
        "circle square triangle star ring cross",
        "wooden metal glass plastic stone",
    )
)  # fmt: skip
"""Words of which one may stand for another."""
_OPPOSITES = (
    "small large", "little big", "tiny huge", "short tall", "young old", "left right", "top bottom", "above below", "over under",
    "inside outside", "day night", "summer winter", "sunny rainy", "light dark", "bright dark", "hot cold", "wet dry", "open closed",
    "happy sad", "smiling crying", "standing sitting", "running sleeping", "full empty", "crisp blurred", "vivid pale",
    "shaded flat", "background foreground",
)  # fmt: skip
_SYNONYMS = {"gray": "grey", "violet": "purple", "orange": "yellow", "pink": "purple", "turquoise": "cyan"}
_READ = 200  # characters that even CLIP, of 77 tokens, reads
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def perturb(caption: str) -> str | None:
    """A caption with one word replaced by another of its class or by its opposite, or with two words of a class exchanged; None where
    it has no such word. A function of the caption alone. Words near its beginning are preferred: encoders cut long texts."""
    words = [(match.start(), match.end(), match.group()) for match in _WORD.finditer(caption)]
    found: list[tuple[tuple[int, int, str], ...]] = []
    for start, end, word in words:
        found += [((start, end, other),) for other in _others(word.lower())]
    for i, one in enumerate(words):
        for two in words[i + 1 :]:
            if one[2].lower() != two[2].lower() and _class(one[2].lower()) is not None and _class(one[2].lower()) == _class(two[2].lower()):
                found.append(((one[0], one[1], two[2].lower()), (two[0], two[1], one[2].lower())))
    if not found:
        return None
    early = [changes for changes in found if changes[0][1] <= _READ]
    return _replaced(caption, random.Random(seed_of("perturbed", caption)).choice(early or found))


@lru_cache(maxsize=8)
def read_perturbed(path: Path) -> Mapping[str, str]:
    """Captions and their perturbed versions from the columns `prompt` and `perturbed` of a CSV or JSONL file."""
    if not path.is_file():
        raise ValueError(f"no file {path}: give a CSV or JSONL file with the columns prompt and perturbed")
    found: dict[str, str] = {}
    for row in read_rows(path, ("perturbed",), (*PROMPT_COLUMNS, "perturbed"), Report()):
        prompt = next((str(row.values[name]).strip() for name in PROMPT_COLUMNS if row.values.get(name)), "")
        other = str(row.values.get("perturbed") or "").strip()
        if not prompt or not other or prompt == other:
            raise ValueError(f"{row.where}: give a prompt, and another text in the column perturbed")
        found[prompt] = other
    return found


def _class(word: str) -> int | None:
    word = _SYNONYMS.get(word, word)
    return next((i for i, words in enumerate(_CLASSES) if word in words), None)


def _others(word: str) -> list[str]:
    which = _class(word)
    same = [] if which is None else [other for other in _CLASSES[which] if other != _SYNONYMS.get(word, word)]
    pairs = (pair.split() for pair in _OPPOSITES)
    return [*same, *(pair[1 - pair.index(word)] for pair in pairs if word in pair)]


def _replaced(caption: str, changes: tuple[tuple[int, int, str], ...]) -> str:
    for start, end, word in sorted(changes, reverse=True):
        word = word.capitalize() if caption[start].isupper() else word
        before, after = caption[:start], caption[end:]
        article = "n" if word[0].lower() in "aeiou" else ""
        caption = re.sub(r"\b([Aa])n?(\s+)$", rf"\g<1>{article}\g<2>", before) + word + after
    return caption
