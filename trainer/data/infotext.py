"""The text of generation settings that A1111, Forge and SD.Next write beside an image, or SwarmUI as JSON."""

from __future__ import annotations

import json
import re
from typing import Any, cast

_SETTINGS = re.compile(r"\bSteps: ?\d+, ?(?:Sampler|Schedule type|Scheduler|Size|Seed|CFG scale|Model|Version)", re.IGNORECASE)
_NEGATIVE = re.compile(r"(?:^|(?<=[\r\n]))[ \t]*Negative prompt:", re.IGNORECASE)


def positive_prompt(text: str) -> str | None:
    """The positive prompt in a text of generation settings, empty where it has none; None for a text that is a prompt itself."""
    if text.lstrip().startswith("{"):
        return _of_json(text)
    settings, negative = _SETTINGS.search(text), _NEGATIVE.search(text)
    if settings and not negative:  # some tools put all on one line
        negative = re.compile("Negative prompt:", re.IGNORECASE).search(text, 0, settings.start())
    ends = [match.start() for match in (settings, negative) if match]
    return text[: min(ends)].strip() if ends else None


def _of_json(text: str) -> str | None:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):  # a prompt with alternatives in braces
        return None
    settings = cast(dict[str, Any], values).get("sui_image_params")
    prompt = cast(dict[str, Any], settings).get("prompt") if isinstance(settings, dict) else None
    if not isinstance(prompt, str):
        raise ValueError("holds JSON, not a prompt")
    return prompt.strip()
