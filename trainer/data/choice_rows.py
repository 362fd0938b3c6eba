"""A file of choices as rows that train: pairs, and images with labels."""

from __future__ import annotations

from pathlib import Path

from .choices import OUTCOMES, Choice, Choices, read_choices
from .report import Report


def preference_rows(path: Path, report: Report) -> list[tuple[Path, Path, str]]:
    """Better image, worse image and prompt of each pair of a file, as training reads them; ValueError where a prompt is missing."""
    found = _reported(path, report)
    for one in found.records:
        why = "likes and dislikes" if one.kind == "thumb" else {"tie": "ties", "skip": "skipped"}.get(one.outcome)
        if why is not None:
            report.leave_out(why, f"line {one.line}")
        else:
            _check_prompt(path, one)
    rows = [(pair.chosen, pair.rejected, pair.prompt) for pair in found.pairs()]
    if not rows:
        thumbs = any(one.kind == "thumb" for one in found.records)
        raise ValueError(
            f"{path} holds {'likes and dislikes alone: give it as labels, or choose between images' if thumbs else 'no choice yet'}"
        )
    return rows


def label_rows(path: Path, report: Report) -> list[tuple[Path, str, float]]:
    """Image, prompt and label, 1 liked or −1 disliked, of a file, as training reads them; of several persons, the majority's."""
    found, votes = _reported(path, report), dict[tuple[Path, str], float]()
    for one in found.records:
        if one.outcome in OUTCOMES["thumb"][:2]:
            _check_prompt(path, one)
    for one in found.labels():
        votes[one.image, one.prompt] = votes.get((one.image, one.prompt), 0.0) + (1.0 if one.liked else -1.0)
    if not votes:
        raise ValueError(f"{path} holds no likes or dislikes: give it as pairs")
    for (image, _), total in votes.items():
        if not total:
            report.leave_out("liked by as many as disliked it", image.name)
    return [(image, prompt, 1.0 if total > 0 else -1.0) for (image, prompt), total in votes.items() if total]


def _reported(path: Path, report: Report) -> Choices:
    found = read_choices(path)
    for number, why in found.cut:
        report.leave_out(why, f"line {number}")
    return found


def _check_prompt(path: Path, one: Choice) -> None:
    if not one.prompt.strip():
        raise ValueError(f"{path}, line {one.line}: no prompt: write it under prompt, or remove the line")
