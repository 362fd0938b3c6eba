"""Charts and image sheets of a page of results. Labels are mid-grey on a transparent ground: legible in light and in dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..data.images import grid, to_pil
from ..metrics.frontier import SHARE, Curves
from ..metrics.study import BASE, Point
from ..objectives import OBJECTIVES
from .experiment import START

TITLES = {name: cls.title for name, cls in OBJECTIVES.items()} | {
    "base": "base",
    "base_unguided": "base, unguided",
    "few-step": "few-step model",
    "pso-early": "PSO, first steps",
    "draft-k": "DRaFT-8",
    "srpo-bias": "SRPO, bias named",
    "better-images": "better images alone",
    "refl-relevant": "ReFL, decomposed reward",
}
AXES = (("heldout", "held-out"), ("reward", "proxy"), ("gold", "gold"))
INK = "#7b838c"
SHOWN = 4  # prompts of which images are shown
TILE, GAP = 128, 4  # pixels of an image in a strip: twice its size
OVERVIEW: dict[str, Point] = {
    "base": BASE,
    "ReFL alone": ("refl", 0),
    "base → ReFL": ("refl", START),
    "base → ImageReFL": ("imagerefl", START),
}
"""The columns of the demo's overview."""


def title(model: str) -> str:
    """`refl best` -> `ReFL best`, `chats-loser` -> `CHATS loser`."""
    name, _, rest = model.partition(" ")
    whole = next(key for key in (name, name.rpartition("-")[0]) if key in TITLES)
    return " ".join(part for part in (TITLES[whole], name.removeprefix(whole).lstrip("-"), rest) if part)


def png(image: Any) -> str:
    """A PIL image or a matplotlib figure as base64 PNG."""
    buffer = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(buffer, format="png", dpi=140)
    else:
        image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def new_figure(width: float, height: float) -> Any:
    """A transparent matplotlib figure; size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _quiet(panel: Any) -> None:
    """Grey axes without a frame."""
    panel.set_facecolor("none")
    panel.tick_params(colors=INK)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        panel.spines[side].set_color(INK)
    panel.xaxis.label.set_color(INK)
    panel.yaxis.label.set_color(INK)
    panel.title.set_color(INK)


def _legend(panel: Any, size: int, **options: Any) -> None:
    panel.legend(fontsize=size, labelcolor=INK, frameon=False, **options)


def frontier_figure(results: Mapping[str, Any], axes: Sequence[tuple[str, str]] = AXES) -> Any:
    """Gain over the base against diversity, one panel per reward, one curve per method from the tuned model alone (k = 0) on."""
    figure = new_figure(4.8 * len(axes), 4)
    for panel, (axis, label) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes):
        frontier_panel(panel, results, axis, label)
    _legend(figure.axes[0], 8 if len(results["curves"]) > 2 else 11)
    return figure


def frontier_panel(panel: Any, results: Mapping[str, Any], axis: str, label: str) -> None:
    """One reward: curves over the switches, an arrow from k = 0 to the switch, 95 % intervals where figures per prompt are there."""
    from matplotlib import colormaps

    base = results["base"]
    study = Curves(results["per_prompt"]) if "per_prompt" in results else None
    panel.axhline(0, color=INK, linewidth=0.8)
    panel.axvline(SHARE, color=INK, linestyle="--", linewidth=1)
    panel.text(SHARE, 0.97, f" {100 * SHARE:.0f} %", color=INK, fontsize=10, transform=panel.get_xaxis_transform())
    panel.margins(x=0.12)
    for number, name in enumerate(results["curves"]):
        points = {p["k"]: (p["diversity"] / base["diversity"], p[axis] - base[axis]) for p in results["points"] if p["model"] == name}
        colour = colormaps["tab10"](number)
        panel.plot(*zip(*points.values(), (1, 0)), "o-", color=colour, linewidth=1.2, markersize=4, label=title(name))
        for k in points if study else ():
            x, y = (study.interval(f"{name}|{k}", a) for a in ("diversity", axis))  # pyright: ignore[reportOptionalMemberAccess]
            panel.plot(x[1:], [y[0]] * 2, color=colour, alpha=0.35, linewidth=1.5)
            panel.plot([x[0]] * 2, y[1:], color=colour, alpha=0.35, linewidth=1.5)
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "connectionstyle": "arc3,rad=-0.25", "shrinkA": 4, "shrinkB": 4}
        panel.annotate("", points[START], points[0], arrowprops=arrow)
        for k in (0, START) if len(results["curves"]) <= 4 else ():  # the texts of ten curves hide one another
            place = {"xytext": (7, 6) if number else (-5, -14), "textcoords": "offset points", "ha": "left" if number else "right"}
            panel.annotate("alone" if k == 0 else f"k = {k}", points[k], fontsize=10, color=colour, **place)
    panel.plot([1], [0], "*", color=INK, markersize=13, label="base")
    panel.set_xlabel("diversity of content, share of the base's")
    panel.set_ylabel(f"gain in {label} reward")
    _quiet(panel)


def curves_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Proxy, held-out, gold and diversity over the evaluations, as changes from the first one; one panel per method."""
    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    width = max(2.7, 9 / columns)
    figure = new_figure(width * columns, 0.85 * width * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (name, points) in zip(panels, curves.items()):
        steps, first = [p["step"] for p in points], points[0]
        for axis, label in AXES:
            panel.plot(steps, [p[axis] - first[axis] for p in points], label=label)
        panel.plot(steps, [p["diversity"] / first["diversity"] - 1 for p in points], ":", color=INK, label="diversity, relative")
        panel.set_title(title(name), fontsize=9)
        panel.set_xlabel("optimizer step", fontsize=8)
        panel.grid(alpha=0.3)
        _quiet(panel)
    for panel in panels[len(curves) :]:
        panel.axis("off")
    _legend(panels[0], 6 if len(curves) > 2 else 9)
    return figure


def sheet(images: Tensor, per_prompt: int) -> Any:
    """The images of the first prompts as one PIL image, twice their size: a prompt per row, a seed per column."""
    whole = to_pil(grid(images[: SHOWN * per_prompt], per_prompt))
    return whole.resize((2 * whole.width, 2 * whole.height), 0)


def strip(images: Tensor) -> Any:
    """Images (N,3,64,64) side by side as one PIL image with transparent gaps."""
    from PIL import Image

    whole = Image.new("RGBA", (len(images) * (TILE + GAP) - GAP, TILE))
    for i, image in enumerate(images):
        whole.paste(to_pil(image).resize((TILE, TILE), Image.Resampling.LANCZOS), (i * (TILE + GAP), 0))
    return whole


def overview(strips: Mapping[str, Sequence[Any]], notes: Mapping[str, str], *, narrow: bool) -> Any:
    """The demo's overview for a README. Wide: models side by side, a row per prompt; narrow: models below one another, the first prompt.

    strips: per model a strip of each prompt; notes: per model gain and diversity; narrow has room for the diversity alone.
    """
    from matplotlib.figure import Figure

    rows, columns = (1, 1) if narrow else (len(next(iter(strips.values()))), len(strips))
    between, head = (0, 44) if narrow else (36, 92)
    side = next(iter(strips.values()))[0].width
    block = head + rows * (TILE + GAP)
    width, height = columns * side + (columns - 1) * between, (len(strips) if narrow else 1) * block
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="none")
    for i, (caption, images) in enumerate(strips.items()):
        left, top = (0, height - i * block) if narrow else (i * (side + between), height)
        if narrow:
            figure.text(0, (top - head + 10) / height, caption, color=INK, weight="bold", fontsize=20)
            figure.text(1, (top - head + 10) / height, notes[caption].split(", ")[-1], color=INK, ha="right", fontsize=18)
        else:
            figure.text(left / width, (top - 36) / height, caption, color=INK, weight="bold", fontsize=25)
            figure.text(left / width, (top - 76) / height, notes[caption], color=INK, fontsize=21)
        for row in range(rows):
            figure.figimage(images[row], left, top - head - row * (TILE + GAP) - TILE, origin="upper")
    return figure
