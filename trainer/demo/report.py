"""One self-contained HTML page: what training bought and what it cost, in pictures and figures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import images as pictures
from ..metrics.summary import Judged, frontier_point

_NAMES = {"base": "base", "base_unguided": "base, unguided", "refl": "ReFL", "imagerefl": "ImageReFL"}
_COLOURS = {"refl": "#c4532d", "imagerefl": "#1f6f8b", "base": "#444444", "base_unguided": "#999999"}


@dataclass(frozen=True)
class Comparison:
    """What a page is made of: images (N,3,H,W) by model, each prompt's images in a row, and how they were judged."""

    drawn: Mapping[str, Tensor]
    prompts: Sequence[str]
    per_prompt: int
    headline: int  # the k that the text speaks of
    switches: Sequence[int]
    base: Judged
    by_method: Mapping[str, Sequence[Judged]]  # in the order of `switches`


def png(picture: Any) -> str:
    """A PIL picture as base64 PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def figure_png(figure: Any) -> str:
    """A matplotlib figure as base64 PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def frontier_figure(shown: Comparison, axes: Sequence[str]) -> Any:
    """Reward against diversity, one panel per reward, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(axes), 3.8))
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes):
        _frontier_panel(panel, shown, axis)
    figure.tight_layout()
    return figure


def curves_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Proxy, held-out, gold and diversity over training, one panel per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.4))
    for panel, (method, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        steps = [p["step"] for p in points]
        for name, label in (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("diversity", "diversity")):
            values = [p[name] for p in points]
            panel.plot(steps, [v / values[0] if name == "diversity" else v - values[0] for v in values], label=label)
        panel.set_title(f"{_NAMES[method]}, k = 0")
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("change; diversity as a ratio")
        panel.legend(fontsize=8)
    figure.tight_layout()
    return figure


def overview_figure(shown: Comparison) -> Any:
    """One picture for a README: the same prompts (rows) and seeds (columns) from four models, and the frontier."""
    from matplotlib.figure import Figure

    rows, columns, headline = 4, min(4, shown.per_prompt), shown.headline
    labels = ["base", "refl k=0", f"refl k={headline}", f"imagerefl k={headline}"]
    titles = ["base", "ReFL alone", f"base → ReFL at step {headline}", f"base → ImageReFL at step {headline}"]
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    panels = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.35])
    chosen = [p * shown.per_prompt + i for p in range(rows) for i in range(columns)]
    for panel, label, title in zip(panels, labels, titles):
        panel.imshow(pictures.grid(shown.drawn[label][chosen], columns).permute(1, 2, 0).numpy(), interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.axis("off")
    _frontier_panel(panels[4], shown, "heldout")
    return figure


def _frontier_panel(panel: Any, shown: Comparison, axis: str) -> None:
    for method, points in shown.by_method.items():
        at = [frontier_point(p, shown.base, axis) for p in points]
        panel.plot([x for x, _ in at], [y for _, y in at], "o-", color=_COLOURS[method], label=_NAMES[method])
        for (x, y), k in zip(at, shown.switches):
            panel.annotate(f"k={k}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=_COLOURS[method])
    panel.axhline(0, color="#888888", linestyle=":", linewidth=1)
    panel.axvline(1, color="#888888", linestyle=":", linewidth=1)
    panel.plot([1], [0], "s", color=_COLOURS["base"], label="base")
    panel.set_xlabel("diversity / base diversity")
    panel.set_ylabel(f"{'proxy' if axis == 'reward' else axis} gain (base s.d.)")
    panel.legend(fontsize=8)


def write_report(path: Path, results: Mapping[str, Any], shown: Comparison) -> None:
    """Write the demo's page."""
    from jinja2 import Environment

    rows, headline = 4, shown.headline
    order = ["base", "base_unguided", "refl k=0", f"refl k={headline}", "imagerefl k=0", f"imagerefl k={headline}"]
    grids = []
    for label in order:
        sheet = pictures.to_pil(pictures.grid(shown.drawn[label][: rows * shown.per_prompt], shown.per_prompt))
        sheet = sheet.resize((sheet.width * 2, sheet.height * 2), 0)
        name, _, k = label.partition(" ")
        grids.append((f"{_NAMES[name]}{', ' + k if k else ''}", png(sheet)))
    columns = ["reward", "heldout", "gold", "diversity", "fid", "logcov"]
    table = [{"name": _NAMES[n], "headline": False, "values": [results[n][c] for c in columns]} for n in ("base", "base_unguided")]
    for point in results["points"]:
        name = f"{_NAMES[point['model']]}, k={point['k']}"
        table.append({"name": name, "headline": point["k"] == headline, "values": [point[c] for c in columns]})
    environment = Environment(autoescape=True)
    page = environment.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8")).render(
        quick=results["config"]["quick"],
        summary=summary(results, headline),
        steps=20,
        frontier=figure_png(frontier_figure(shown, ["heldout", "reward", "gold"])),
        areas=[(_NAMES[m], results["frontier"][m]["heldout"], *results["ci"]["frontier"][m]) for m in shown.by_method],
        lead=results["ci"]["frontier_lead"],
        shown=list(dict.fromkeys(shown.prompts))[:rows],
        grids=grids,
        columns=columns,
        table=table,
        curves=figure_png(curves_figure(results["curves"])),
        settings=json.dumps(results["config"], indent=1),
    )
    path.write_text(page, "utf-8")


def summary(results: Mapping[str, Any], headline: int) -> str:
    """What happened, in sentences that follow the figures wherever they fall."""
    base = results["base"]
    points = {(p["model"], p["k"]): p for p in results["points"]}

    def change(point: Mapping[str, float]) -> str:
        kept = 100 * point["diversity"] / base["diversity"]
        return f"held-out reward {point['heldout'] - base['heldout']:+.2f}, {kept:.0f} % of the base model's diversity"

    parts = [
        f"{_NAMES[m]} alone: {change(points[m, 0])}; combined at k={headline}: {change(points[m, headline])}."
        for m in ("refl", "imagerefl")
    ]
    return " ".join(parts)
