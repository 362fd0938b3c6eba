"""One self-contained HTML page of results: figures, tables, images, curves and settings."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..data.images import grid, to_pil
from ..metrics.study import BASE
from ..runtime.files import write_text
from .experiment import START, STEPS, UNGUIDED, Evaluated

TITLES = {
    "base": "base",
    "base_unguided": "base, unguided",
    "refl": "ReFL",
    "imagerefl": "ImageReFL",
    "draft-k": "DRaFT-8",
    "draft-lv": "DRaFT-LV",
    "alignprop": "AlignProp",
    "drtune": "DRTune",
    "direct-align": "Direct-Align",
    "srpo": "SRPO",
    "sqdf": "SQDF",
}
AXES = (("heldout", "held-out"), ("reward", "proxy"), ("gold", "gold"))
COLUMNS = ("reward", "heldout", "gold", "relative", "diversity", "fid", "logcov")
SHOWN = 4  # prompts of which images are shown


def title(model: str) -> str:
    """`refl best` -> `ReFL best`."""
    name, _, rest = model.partition(" ")
    return f"{TITLES[name]} {rest}".strip()


def frontier_figure(results: Mapping[str, Any]) -> Any:
    """Gain over the base against diversity, one panel per reward, one line per method from the tuned model alone (k = 0) on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(AXES), 4.2), layout="constrained")
    for panel, (axis, label) in zip(figure.subplots(1, len(AXES)), AXES):
        frontier_panel(panel, results, axis, label)
    figure.axes[0].legend(fontsize=7)
    return figure


def frontier_panel(panel: Any, results: Mapping[str, Any], axis: str, label: str) -> None:
    """One reward's gain against diversity; switches are named where a line has more than two."""
    from matplotlib import colormaps

    base = results["base"]
    for number, name in enumerate(results["curves"]):
        points = [p for p in results["points"] if p["model"] == name]
        at = [(p["diversity"] / base["diversity"], p[axis] - base[axis]) for p in points]
        colour = colormaps["tab10"](number)
        panel.plot([x for x, _ in at], [y for _, y in at], "-", color=colour, linewidth=1)
        for (x, y), k in zip(at, (p["k"] for p in points)):
            panel.plot([x], [y], "o" if k == 0 else "s", color=colour, fillstyle="full" if k == 0 else "none")
            if len(at) > 2:
                panel.annotate(f"k={k}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour)
        panel.plot([], [], "o-", color=colour, label=title(name))
    for name, marker in (("base", "*"), ("base_unguided", "x")):
        x, y = results[name]["diversity"] / base["diversity"], results[name][axis] - base[axis]
        panel.plot([x], [y], marker, color="#444444", markersize=9, label=title(name))
    panel.axhline(0, color="#888888", linestyle=":", linewidth=1)
    panel.axvline(1, color="#888888", linestyle=":", linewidth=1)
    panel.set_xlabel("diversity / base diversity")
    panel.set_ylabel(f"{label} gain over the guided base")


def curves_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Proxy, held-out, gold and diversity over the evaluations, as changes from the first one; one panel per method."""
    from matplotlib.figure import Figure

    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    width = max(2.7, 9 / columns)
    figure = Figure(figsize=(width * columns, 0.85 * width * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (name, points) in zip(panels, curves.items()):
        steps, first = [p["step"] for p in points], points[0]
        for axis, label in AXES:
            panel.plot(steps, [p[axis] - first[axis] for p in points], label=label)
        panel.plot(steps, [p["diversity"] / first["diversity"] - 1 for p in points], ":", color="#444444", label="diversity, relative")
        panel.set_title(title(name), fontsize=9)
        panel.set_xlabel("optimizer step", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.axis("off")
    panels[0].legend(fontsize=6)
    return figure


def png(image: Any) -> str:
    """A PIL image or a matplotlib figure as base64 PNG."""
    buffer = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(buffer, format="png", dpi=110)
    else:
        image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sheet(images: Tensor, per_prompt: int) -> Any:
    """The images of the first prompts as one PIL image, twice their size: a prompt per row, a seed per column."""
    whole = to_pil(grid(images[: SHOWN * per_prompt], per_prompt))
    return whole.resize((2 * whole.width, 2 * whole.height), 0)


def write(
    out: Path, results: Mapping[str, Any], evaluated: Evaluated, heading: str, summary: str, kind: Literal["demo", "comparison"]
) -> None:
    """Write `results.json` and `report.html`."""
    from jinja2 import Environment

    write_text(json.dumps(results, indent=1) + "\n", out / "results.json")
    prompts = evaluated.prompts
    sheets = {title("base"): BASE, title("base_unguided"): UNGUIDED}
    for name in results["curves"]:
        sheets |= {f"{title(name)} alone": (name, 0), f"{title(name)} after {START} steps of the base": (name, START)}
    rows = [{"model": name, "k": STEPS, **results[name]} for name in ("base", "base_unguided")]
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("page.html.j2").read_text("utf-8"))
    page = template.render(
        results=results,
        heading=heading,
        summary=summary,
        kind=kind,
        steps=STEPS,
        start=START,
        title=title,
        rows=[*rows, *results["points"]],
        columns=[name for name in COLUMNS if name in results["base"]],
        frontier=png(frontier_figure(results)),
        curves=png(curves_figure(results["curves"])),
        sheets={caption: png(sheet(evaluated.images[point], prompts.count(prompts[0]))) for caption, point in sheets.items()},
        prompts=list(dict.fromkeys(prompts))[:SHOWN],
        settings=json.dumps(results["config"], indent=1),
    )
    write_text(page, out / "report.html")
