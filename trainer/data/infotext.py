"""The text of generation settings that A1111, Forge and SD.Next write beside an image, or SwarmUI as JSON."""

from __future__ import annotations

import json
import re
from typing import Any, cast

_SETTINGS = re.compile(r"\bSteps: ?\d+, ?(?:Sampler|Schedule type|Scheduler|Size|Seed|CFG scale|Model|Version)", re.IGNORECASE)
_NEGATIVE_INSIDE = re.compile("Negative prompt:", re.IGNORECASE)
_NEGATIVE = re.compile(r"(?:^|(?<=[\r\n]))[ \t]*Negative prompt:", re.IGNORECASE)


def positive_prompt(text: str) -> str | None:
    """The positive prompt in a text of generation settings, empty where it has none; None for a text that is a prompt itself.

    The settings are the last line that begins with them. Only where they begin no line, as some tools put all on one, "Negative prompt:"
    counts inside a line.
    """
    if text.lstrip().startswith("{") and (values := _object(text)) is not None:
        return _of_json(values)
    found = list(_SETTINGS.finditer(text))
    lines = [match for match in found if text[: match.start()].rstrip(" \t")[-1:] in ("", "\r", "\n")]
    settings = (lines or found or [None])[-1]
    negative = _NEGATIVE.search(text, 0, settings.start() if settings else len(text))
    if settings and not lines and not negative:
        negative = _NEGATIVE_INSIDE.search(text, 0, settings.start())
    ends = [match.start() for match in (settings, negative) if match]
    return text[: min(ends)].strip() if ends else None


def _object(text: str) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], json.loads(text))
    except (ValueError, RecursionError):  # a prompt with alternatives in braces
        return None


def _of_json(values: dict[str, Any]) -> str:
    settings = values.get("sui_image_params")
    prompt = cast(dict[str, Any], settings).get("prompt") if isinstance(settings, dict) else None
    if not isinstance(prompt, str):
        raise ValueError("holds JSON, not a prompt")
    return prompt.strip()
