"""The prompt that ComfyUI or A1111 wrote into an image file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image

_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769
_TEXT_INPUTS = ("text", "prompt", "text_g", "t5xxl", "clip_l", "string", "value", "text_l")  # of encoders, then of text nodes
_POSITIVE = ("positive", "conditioning", "conditioning_1", "conditioning_to", "cond", "guider")


def embedded_prompt(path: Path) -> str | None:
    """The positive prompt in a PNG's text chunks or another format's EXIF, or None."""
    try:
        with Image.open(path) as image:
            texts = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
            exif = image.getexif()
            tags = [*exif.values(), *exif.get_ifd(_EXIF_IFD).values()]
    except Exception:  # Pillow's readers raise many types for a damaged file
        return None  # decoding the pixels reports the error
    for comment in filter(None, map(_decoded, tags)):
        label, colon, rest = comment.partition(":")
        if colon and label.lower() in ("prompt", "workflow"):  # as ComfyUI writes WebP and JPEG
            texts.setdefault(label.lower(), rest)
        else:
            texts.setdefault("parameters", comment)
    return _comfyui(texts.get("prompt")) or _a1111(texts.get("parameters"))


def _decoded(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return None
    if value.startswith(b"UNICODE\0"):
        body = value[8:]
        # A1111 writes big-endian; more zeros in every second byte mean little-endian
        return body.decode("utf-16-le" if body[1::2].count(0) > body[0::2].count(0) else "utf-16-be", "replace")
    return value.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace")


def _a1111(parameters: str | None) -> str | None:
    """The lines before the negative prompt and the settings; None for text without settings."""
    if parameters is None or "Steps: " not in parameters:
        return None
    lines: list[str] = []
    for line in parameters.splitlines():
        if line.startswith(("Negative prompt:", "Steps: ")):
            break
        lines.append(line)
    return "\n".join(lines).strip() or None


def _comfyui(text: str | None) -> str | None:
    """The text linked to the positive input of a sampler in an API graph."""
    try:
        graph: Any = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError):  # thousands of nested brackets
        return None
    if not isinstance(graph, dict):
        return None
    nodes = {str(k): cast(dict[str, Any], v)["inputs"] for k, v in cast(dict[str, Any], graph).items() if _is_node(v)}
    ends = [name for name, inputs in nodes.items() if "positive" in inputs or "guider" in inputs]
    return next((found for name in ends if (found := _follow(nodes, name))), None)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(cast(dict[str, Any], value).get("inputs"), dict)


def _follow(nodes: Mapping[str, Mapping[str, Any]], start: str) -> str | None:
    """The first text in depth-first order from a node, along inputs that carry the positive prompt; each node is read once."""
    waiting: list[tuple[str, str]] = [("node", start)]
    seen: set[str] = set()
    while waiting:
        kind, what = waiting.pop()
        if kind == "text":
            return what
        if what in seen:
            continue
        seen.add(what)
        steps: list[tuple[str, str]] = []
        for name in (*_POSITIVE, *_TEXT_INPUTS):
            value = nodes[what].get(name)
            if isinstance(value, str) and name in _TEXT_INPUTS and value.strip():
                steps.append(("text", value.strip()))
            elif isinstance(value, list) and value and str(cast(list[Any], value)[0]) in nodes:
                steps.append(("node", str(cast(list[Any], value)[0])))
        waiting += reversed(steps)
    return None
