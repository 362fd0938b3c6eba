"""The prompt inside an image file, as the common generators write it.

Read are ComfyUI's graph and the settings of A1111, Forge, SD.Next, SwarmUI, InvokeAI, Fooocus, NovelAI and Draw Things, wherever they are
stored: PNG text, EXIF, XMP or, for NovelAI, the alpha channel. Those of Fooocus, NovelAI and older InvokeAIs are read by the parsers of
`sd_parsers`. Its other parts are not used: of ComfyUI it lists the texts of all samplers, an A1111 prompt that quotes "Negative prompt:"
makes it fail, and its EXIF and alpha readers keep the last image in a global, so that threads get another image's prompt.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from ..data.infotext import positive_prompt
from .graph import UnclearPrompt, graph_prompt, only_one

_EXIF_IFD, _USER_COMMENT, _XP_TAGS = 0x8769, 0x9286, range(0x9C9B, 0x9CA0)
_XMP_COMMENT = re.compile(r"<exif:UserComment>.*?<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)
_STEALTH = {b"stealth_pngcomp": True, b"stealth_pnginfo": False}  # whether it is compressed
_LONGEST = 1 << 26  # of text hidden in pixels, in bytes


def embedded_prompt(path: Path) -> str | None:
    """The positive prompt that a generator wrote into the file, verbatim with weights and LoRA tags; None where there is none.

    Raises UnclearPrompt, with the file and the reason, where prompts differ or the file does not hold the one used.
    """
    try:
        with Image.open(path) as image:
            texts, comments = _texts(image)
            hidden = {} if _known(texts) or comments or image.mode != "RGBA" else _hidden(image)
    except Exception:  # Pillow's readers raise many types for a damaged file
        return None  # decoding the pixels reports the error
    found, reasons = _prompts(texts | hidden, comments, path.name)
    try:
        prompt = only_one(found, "it holds")
    except UnclearPrompt as error:
        raise UnclearPrompt(f"{path}: {error}") from error
    if not prompt and reasons:
        raise UnclearPrompt(f"{path}: {reasons[0]}")
    return prompt or None


# -- what a file holds -----------------------------------------------------------------------------------------------


def _texts(image: Image.Image) -> tuple[dict[str, str], list[str]]:
    """The PNG's texts by key, and every text of EXIF and XMP."""
    texts = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    if image.format == "PNG" and not _known(texts):
        image.load()  # texts may stand behind the pixels
        texts |= {str(k): str(v) for k, v in getattr(image, "text", {}).items()}
    xmp = image.info.get("xmp", texts.get("XML:com.adobe.xmp", ""))
    xmp = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    comments = [html.unescape(match) for match in _XMP_COMMENT.findall(xmp)]
    try:
        exif = image.getexif()
        tags = [*exif.items(), *exif.get_ifd(_EXIF_IFD).items()]
    except Exception:  # damaged EXIF beside readable texts
        tags = []
    for comment in filter(None, (_decoded(tag, value) for tag, value in tags)):
        label, colon, rest = comment.partition(":")
        if colon and label.lower() in ("prompt", "workflow"):  # as ComfyUI writes WebP
            texts.setdefault(label.lower(), rest)
        else:
            comments.append(comment)
    return texts, comments


def _known(texts: Mapping[str, str]) -> bool:
    return bool(texts.keys() & {"prompt", "parameters", "invokeai_metadata", "sd-metadata", "Dream", "Comment", "XML:com.adobe.xmp"})


def _decoded(tag: int, value: Any) -> str | None:
    """An EXIF value as text: UserComment has a prefix that names its characters, Windows' XP tags are UTF-16."""
    if isinstance(value, tuple) and tag in _XP_TAGS:
        value = bytes(cast(tuple[int, ...], value))
    if isinstance(value, str):
        try:
            return value.encode("latin-1").decode("utf-8")  # Pillow reads all as Latin-1
        except UnicodeError:
            return value
    if not isinstance(value, bytes):
        return None
    prefix, body = (value[:8], value[8:]) if tag == _USER_COMMENT else (b"", value)
    if tag in _XP_TAGS:
        return body.decode("utf-16-le", "replace").rstrip("\0")
    if prefix == b"UNICODE\0" and 0 in body:
        # A1111 writes big-endian; more zeros in every second byte mean little-endian
        order = "utf-16-le" if body[1::2].count(0) > body[0::2].count(0) else "utf-16-be"
        return body.decode(order, "replace").removeprefix("\ufeff")
    if tag == _USER_COMMENT and prefix not in (b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8):
        body = value  # without a prefix
    return body.decode("utf-8", "replace").strip("\0")


def _hidden(image: Image.Image) -> dict[str, str]:
    """The texts in the lowest bits of the alpha channel, column by column: a name, the number of bits, the text."""
    bits = np.asarray(image.getchannel("A")).T.reshape(-1) & 1
    compressed = _STEALTH.get(np.packbits(bits[:120]).tobytes())
    if compressed is None:
        return {}
    length = int.from_bytes(np.packbits(bits[120:152]).tobytes(), "big")
    data = np.packbits(bits[152 : 152 + length]).tobytes()
    try:
        if compressed:
            data = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, _LONGEST)
        text = data.decode("utf-8")
    except (zlib.error, UnicodeDecodeError):
        return {}
    values = _object(text)
    return {"parameters": text} if values is None else {key: v if isinstance(v, str) else json.dumps(v) for key, v in values.items()}


# -- whose they are --------------------------------------------------------------------------------------------------


def _prompts(texts: Mapping[str, str], comments: list[str], file_name: str) -> tuple[list[str], list[str]]:
    """Every prompt found, and why others were not."""
    found: list[str] = []
    reasons: list[str] = []
    for read in _readers(texts, comments, file_name):
        try:
            found += filter(None, [read()])
        except UnclearPrompt as error:
            reasons.append(str(error))
    return found, reasons


def _readers(texts: Mapping[str, str], comments: list[str], file_name: str) -> Iterator[Callable[[], str | None]]:
    if "prompt" in texts:
        yield lambda: _comfyui(texts["prompt"], file_name)
    elif "workflow" in texts and _object(texts["workflow"]) is not None:
        yield lambda: _refuse("it holds ComfyUI's workflow without the graph that ran")
    for text in filter(None, [texts.get("parameters"), *comments]):
        yield lambda text=text: _settings(text, file_name)
    if "invokeai_metadata" in texts:
        yield lambda: _string(_object(texts["invokeai_metadata"]), "positive_prompt")
    for key in ("sd-metadata", "Dream"):
        if key in texts:
            yield lambda key=key: _by_library("InvokeAIParser", texts, "InvokeAI")
    if "Comment" in texts and "Description" in texts and texts.get("Software") == "NovelAI":
        yield lambda: _novelai(texts)


def _refuse(reason: str) -> None:
    raise UnclearPrompt(reason)


def _object(text: str | None) -> dict[str, Any] | None:
    """A text's JSON object; None for other texts."""
    try:
        value: Any = json.loads(text or "")
    except (ValueError, RecursionError):  # thousands of nested brackets
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _string(values: Mapping[str, Any] | None, key: str) -> str | None:
    value = (values or {}).get(key)
    return value.strip() or None if isinstance(value, str) else None


def _comfyui(text: str | None, file_name: str = "") -> str | None:
    """The prompt of an API graph in JSON."""
    graph = _object(text)
    if not graph or not any(isinstance(node, dict) and "inputs" in node for node in graph.values()):
        return None
    return graph_prompt(graph, file_name)


def _settings(text: str, file_name: str) -> str | None:
    """The prompt in settings as A1111, SwarmUI, Fooocus or Draw Things write them; None for other texts."""
    values = _object(text)
    if values is None:
        return positive_prompt(text) or None
    if isinstance(values.get("sui_image_params"), dict):
        return _string(values["sui_image_params"], "prompt")
    if "base_model" in values and "prompt" in values:
        return _by_library("FooocusParser", {"parameters": text}, "Fooocus")
    if "c" in values and "uc" in values:  # Draw Things
        return _string(values, "c")
    return _comfyui(text, file_name)


def _novelai(texts: Mapping[str, str]) -> str | None:
    """The prompt, and those of its characters behind it."""
    base = _by_library("NovelAIParser", {"Source": "", **texts}, "NovelAI")
    try:
        characters = (_object(texts["Comment"]) or {})["v4_prompt"]["caption"]["char_captions"]
        parts = [base or "", *(str(c["char_caption"]) for c in characters)]
    except (KeyError, TypeError):  # before version 4
        return base
    return ", ".join(part.strip(" ,") for part in parts if part.strip(" ,")) or None


def _by_library(name: str, texts: Mapping[str, str], tool: str) -> str | None:
    try:
        from sd_parsers import parsers
    except ImportError:
        raise UnclearPrompt(f"{tool} wrote it, and reading that needs sd-parsers: pip install sd-parsers") from None
    try:
        samplers = getattr(parsers, name)().parse(dict(texts)).samplers
    except Exception:  # its parsers raise KeyError, AttributeError and others for values of other types
        raise UnclearPrompt(f"it holds settings of {tool} that sd-parsers cannot read") from None
    return only_one((str(prompt.value) for sampler in samplers for prompt in sampler.prompts), f"{tool} wrote") or None
