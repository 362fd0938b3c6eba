"""Socket types, layouts, and widgets made from the trainer's dataclasses. It knows no node."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Collection, Mapping
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..trainer.config import NAMES, RENAMED, build
from .lists import check_image, rgb

CATEGORY = "ImageReFL"
Reward = io.Custom("REWARD_MODEL")
Objective = io.Custom("ALIGN_OBJECTIVE")
Dataset = io.Custom("CAPTIONED_IMAGES")
PreferencePairsSocket = io.Custom("PREFERENCE_PAIRS")
LoraWeights = io.Custom("LORA_MODEL")  # the stock train, save and load nodes' own types
Losses = io.Custom("LOSS_MAP")


def schema(*, shown: Collection[str] | None = None, **keywords: Any) -> io.Schema:
    """A node's schema, without the keywords that this ComfyUI does not know.

    shown: the widgets that people set; the others wait under *Show advanced inputs*, where the browser has that. Default: all.
    """
    for one in keywords["inputs"] if shown is not None else ():
        if isinstance(one, io.WidgetInput) and one.id not in shown:
            one.extra_dict = {**(getattr(one, "extra_dict", None) or {}), "advanced": True}
    if keywords.get("is_output_node"):
        keywords["hidden"] = [*keywords.get("hidden", []), io.Hidden.unique_id]  # show_text needs it
    known = {f.name for f in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in keywords.items() if name in known})


def show_text(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """The node's output `text`; also draws it on the node, which the browser does by itself for Preview as Text alone."""
    draw_text(node, text)
    return ui.PreviewText(text)


def draw_text(node: type[io.ComfyNode], text: str) -> None:
    """Draw text on a node that asks for its hidden `unique_id`, while it runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)  # none where a script calls the node
    number = getattr(getattr(node, "hidden", None), "unique_id", None)
    if server is not None and number:
        server.send_progress_text(text, number[0] if isinstance(number, list) else number)


def pixels(image: torch.Tensor) -> torch.Tensor:
    """IMAGE (B,H,W,C) -> (B,3,H,W) in [0,1], float32."""
    check_image(image)
    if not bool(torch.isfinite(image).all()):
        raise ValueError("an image holds numbers that are not finite: look at the node that made it")
    return rgb(image)


def image(pixels_: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) in [0,1] -> IMAGE (B,H,W,3) on the CPU."""
    return pixels_.detach().movedim(1, -1).float().cpu().contiguous()


def figure(drawn: Any) -> torch.Tensor:
    """A matplotlib Figure as IMAGE (1,H,W,3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    pixels_ = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels_.reshape(1, height, width, 4)[..., :3].float() / 255


def widget_name(field: str) -> str:
    """A field's input: saved graphs know it by the name that it had in 0.1.0."""
    return NAMES[field][0] if field in NAMES else field


def widgets(cls: type[Any], skip: tuple[str, ...] = ()) -> list[Any]:
    """One input per field of a dataclass, with its default, range and help; a number that may be None is an optional socket.

    Fields `since` a later version than 0.1.0 are optional inputs, which come last: saved graphs know widgets by position.
    """
    hints = typing.get_type_hints(cls)
    return [_widget(f, hints[f.name]) for f in dataclasses.fields(cls) if f.name not in skip]


def _widget(field: Any, hint: Any) -> Any:
    meta, tooltip, later = field.metadata, _sentence(field), "since" in field.metadata
    name, label = widget_name(field.name), NAMES.get(field.name, (None, None))[1]
    if hint is bool:
        return io.Boolean.Input(name, display_name=label, optional=later, default=field.default, tooltip=tooltip)
    if hint is int:
        low, high = meta.get("min", 0), meta.get("max", 2**31 - 1)
        return io.Int.Input(name, display_name=label, optional=later, default=field.default, min=low, max=high, tooltip=tooltip)
    if hint is float:
        low, high = float(meta.get("min", -1e6)), float(meta.get("max", 1e6))
        # a step as fine as the default: learning rates and loss weights are small
        step = 10.0 ** -_decimals(field.default)
        return io.Float.Input(
            name, display_name=label, optional=later, default=field.default, min=low, max=high, step=step, round=False, tooltip=tooltip
        )
    choice = next((h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is typing.Literal), None)
    if choice is not None:
        options = [*(["none"] if choice is not hint else []), *typing.get_args(choice)]
        return io.Combo.Input(name, display_name=label, options=options, optional=later, default=field.default or "none", tooltip=tooltip)
    if typing.get_origin(hint) is tuple:
        return io.String.Input(name, default=", ".join(map(str, field.default)), tooltip=f"{tooltip} Separate by commas.")
    if type(None) in typing.get_args(hint):
        return io.Float.Input(name, optional=True, force_input=True, tooltip=f"{tooltip} Not connected: none.")
    return io.String.Input(name, default=field.default, tooltip=tooltip)


def _decimals(default: float) -> int:
    text = f"{default:.6f}".rstrip("0")
    return min(6, max(2, len(text.split(".")[1]) + 1))


def _sentence(field: Any) -> str:
    text = str(field.metadata.get("help", field.name.replace("_", " "))).strip()
    text = text[0].upper() + text[1:].rstrip(".") + "."
    bounds = [f"{word} {field.metadata[key]:g}" for key, word in (("min", "at least"), ("max", "at most")) if key in field.metadata]
    return f"{text} Range: {', '.join(bounds)}." if bounds else text


def collected(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The dataclass that a node's widgets describe; wrong values raise the trainer's own sentence."""
    hints = typing.get_type_hints(cls)
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    given = {k: v for k, v in values.items() if k in hints and v is not None}
    for name, value in given.items():
        if typing.get_origin(hints[name]) is tuple and isinstance(value, str):
            kind = typing.get_args(hints[name])[0]
            given[name] = [kind(part) for part in map(str.strip, value.split(",")) if part]
    return build(cls, given)
