"""What tables and data sets of preferences call their columns, and the words for liked and disliked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

CHOSEN_COLUMNS = ("chosen", "winner", "preferred", "image_chosen", "chosen_image")
REJECTED_COLUMNS = ("rejected", "loser", "dispreferred", "image_rejected", "rejected_image")
TWO_COLUMNS = ("image_0", "image_1", "label_0")  # of Pick-a-Pic: label_0 is 1 where image_0 is better, 0 where image_1 is, 0.5 for ties
OTHER_LABEL = "label_1"  # image_1's, where the table has it
TWO_IMAGES = (("jpg_0", "image_0"), ("jpg_1", "image_1"))  # in data sets; Pick-a-Pic's are JPEG files as bytes
LABEL_COLUMNS = ("label", "liked", "vote")
LIKED = ("liked", "like", "1", "+1", "true", "yes", "good", "up")
DISLIKED = ("disliked", "dislike", "0", "-1", "false", "no", "bad", "down")


def share_of(values: Mapping[str, Any], where: str) -> float:
    """How much Pick-a-Pic's image_0 is the better one: 1, 0, or 0.5 for a tie, and where nobody said."""
    if str(values.get("has_label", "")).strip().lower() in ("false", "no", "0", "0.0"):
        return 0.5
    share, other = (_number(values.get(name)) for name in (TWO_COLUMNS[2], OTHER_LABEL))
    if share not in (0.0, 0.5, 1.0):
        label = short(values.get(TWO_COLUMNS[2]))
        raise ValueError(f"{where}: label_0 is {label}: give 1 where image_0 is better, 0 where image_1 is, 0.5 for a tie")
    if other is not None and share == other == 0:
        return 0.5
    if other is not None and share + other != 1:
        raise ValueError(f"{where}: label_0 is {share:g} and label_1 {other:g}: they must sum to 1, or be 0 for a tie")
    return share


def _number(value: Any) -> float | None:
    """A number; None for nothing or another text."""
    try:
        return float(str(value))
    except ValueError:
        return None


def plain_word(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")


def word_of(value: Any, where: str) -> str:
    """A label as one of the words for liked and disliked."""
    word = plain_word(value)
    if word not in (*LIKED, *DISLIKED):
        raise ValueError(f"{where}: label {short(value)} is neither liked nor disliked: give these words, or 1 and 0, or 1 and -1")
    return word


def check_words(words: Collection[str], source: str) -> None:
    if {"0", "-1"} <= set(words):
        raise ValueError(f"{source}: labels are 0 and -1 as well: leave out what is neither liked nor disliked, and give 1 and one of them")


def short(value: Any) -> str:
    return "missing" if value in (None, "") else repr(value)[:40]
