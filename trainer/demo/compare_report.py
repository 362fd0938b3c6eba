"""The page of a comparison: frontier, figures, pictures, curves and cost of every method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import images as pictures
from .report import figure_png, png
from .show import START, STEPS

_AXES = (("heldout", "held-out"), ("reward", "proxy"), ("gold", "gold"))


def frontier(results: Mapping[str, Any]) -> Any:
    """Gain against diversity, one line per method from the tuned model alone (k = 0) to combined generation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from .compare import METHODS

    colours = [colormaps["tab10"](i) for i in range(10)]
    base = results["base"]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for panel, (axis, label) in zip(figure.subplots(1, len(_AXES)), _AXES):
        for number, name in enumerate(results["curves"]):
            points = [p for p in results["points"] if p["model"] == name]
            x = [p["diversity"] / base["diversity"] for p in points]
            y = [p[axis] - base[axis] for p in points]
            panel.plot(x, y, "-", color=colours[number], linewidth=1)
            for point, a, b in zip(points, x, y):
                alone = point["k"] == 0
                panel.plot([a], [b], "o" if alone else "s", color=colours[number], fillstyle="full" if alone else "none")
            panel.plot([], [], "o-", color=colours[number], label=METHODS[name].title)
        for name, marker in (("base", "*"), ("base_unguided", "x")):
            at = results[name]
            panel.plot(
                [at["diversity"] / base["diversity"]],
                [at[axis] - base[axis]],
                marker,
                color="#444444",
                markersize=9,
                label=name.replace("_", ", "),
            )
        panel.set_xlabel("diversity / base diversity")
        panel.set_ylabel(f"{label} gain over the guided base")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


def curves(results: Mapping[str, Any]) -> Any:
    """Proxy, held-out and gold over the points of the watch, one small panel per method."""
    from matplotlib.figure import Figure

    from .compare import METHODS

    names = list(results["curves"])
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, name in zip(panels, names):
        points = results["curves"][name]
        for axis, label in (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold")):
            panel.plot([p["step"] for p in points], [p[axis] - points[0][axis] for p in points], label=label)
        panel.plot(
            [p["step"] for p in points],
            [p["diversity"] / points[0]["diversity"] - 1 for p in points],
            ":",
            color="#444444",
            label="diversity",
        )
        panel.set_title(METHODS[name].title, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.axis("off")
    panels[0].legend(fontsize=6)
    return figure


def write_report(path: Path, results: Mapping[str, Any], drawn: Mapping[str, Tensor], prompts: Sequence[str], per_prompt: int) -> None:
    """Write the page."""
    from jinja2 import Environment

    from .compare import METHODS

    rows = 3 * per_prompt
    keys = [f"base|{STEPS}", f"base_unguided|{STEPS}", *(f"{name}|{k}" for name in results["curves"] for k in (0, START))]
    sheets: list[tuple[str, str]] = []
    for key in keys:
        name, _, k = key.partition("|")
        sheet = pictures.to_pil(pictures.grid(drawn[key][:rows], per_prompt))
        title = (
            METHODS[name].title + (" alone" if k == "0" else f", base for the first {k} steps")
            if name in METHODS
            else name.replace("_", ", ")
        )
        sheets.append((title, png(sheet.resize((2 * sheet.width, 2 * sheet.height), 0))))
    columns = ["reward", "heldout", "gold", "relative", "diversity", "fid", "logcov"]
    table = [(name.replace("_", ", "), STEPS, [results[name][c] for c in columns]) for name in ("base", "base_unguided")]
    for point in results["points"]:
        name, _, rest = point["model"].partition(" ")
        table.append((f"{METHODS[name].title} {rest}".strip(), point["k"], [point[c] for c in columns]))
    cost = [(METHODS[name].title, c["steps"], c["calls"], c.get("kl")) for name, c in results["cost"].items()]
    page = (
        Environment(autoescape=True)
        .from_string(path_of_template().read_text("utf-8"))
        .render(
            quick=results["config"]["quick"],
            size=results["config"]["size"],
            start=START,
            steps=STEPS,
            frontier=figure_png(frontier(results)),
            curves=figure_png(curves(results)),
            sheets=sheets,
            shown=list(dict.fromkeys(prompts))[:3],
            columns=columns,
            table=table,
            cost=cost,
            settings=json.dumps(results["config"], indent=1),
        )
    )
    path.write_text(page, "utf-8")


def path_of_template() -> Path:
    """The page's template."""
    return Path(__file__).with_name("compare.html.j2")
