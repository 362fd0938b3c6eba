"""The page of a comparison of sampling: gain over what was spent, gain against diversity, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..runtime.files import replacing, write_text
from .charts import png

_AXES = (("reward", "searched reward"), ("heldout", "held-out reward"), ("gold", "gold reward"))
_COLUMNS = ("reward", "heldout", "gold", "diversity", "match", "fid")


def write(out: Path, results: Mapping[str, Any]) -> None:
    """Write `report.html`, `figure.png` and `table.md`."""
    drawn = figure(results["points"])
    with replacing(out / "figure.png") as partial:
        drawn.savefig(partial, format="png", dpi=140)
    write_text(table(results["points"]), out / "table.md")
    size = results["config"]["size"]
    prompts, images, seeds = size["prompts"], size["per_prompt"], len(size["seeds"])

    def lines(key: str) -> str:
        return "".join(f"<li>{escape(verdict(row, key))}</li>" for row in results["points"] if key in row)

    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Reward search at equal budgets</title>
<style>body{{font:15px/1.5 system-ui;margin:2em auto;max-width:60em;padding:0 1em;color-scheme:light dark}}img{{max-width:100%}}
table{{border-collapse:collapse;font-size:13px}}td,th{{padding:.2em .6em;text-align:right;border-bottom:1px solid #8886}}</style>
<h1>Reward search at equal budgets</h1>
<p>The embedded model, {prompts} prompts × {images} images × {seeds} seeds. Every image is the best of a search of
its own. Bars are 95 % intervals over prompts. What is spent is counted per image. TFLOP are what these model calls
(with guidance), decodes and reward calls take at the shapes of Stable Diffusion 1.5 with a ViT-H reward, where a
decode is as much as 1.6 model calls.</p>
<img alt="Gain over cost and against diversity" src="data:image/png;base64,{png(drawn)}">
<h2>Against best-of-n with the same number of model calls</h2><ul>{lines("against")}</ul>
<h2>Against best-of-n with the same TFLOP</h2>
<p>Best-of-n is interpolated between its budgets; points that cost more than its largest are left out.</p>
<ul>{lines("at_cost")}</ul>
<h2>All points</h2>{_html(results["points"])}</html>
"""
    write_text(page, out / "report.html")


def figure(points: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib Figure: each reward over what was spent (above) and against diversity (below)."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 7.5), layout="constrained")
    panels = drawn.subplots(2, 3)
    base = points[0]
    methods = list(dict.fromkeys(row["method"] for row in points[1:]))
    for column, (axis, label) in enumerate(_AXES):
        for number, method in enumerate(methods):
            rows = [base, *(row for row in points if row["method"] == method)]
            for panel, x in ((panels[0, column], [row["tflop"] for row in rows]), (panels[1, column], [row["diversity"] for row in rows])):
                panel.plot(x, [row[axis] for row in rows], marker="o", markersize=4, color=f"C{number}", label=method)
            low, high = ([row["ci"][axis][i] for row in rows] for i in (0, 1))
            panels[0, column].vlines([row["tflop"] for row in rows], low, high, color=f"C{number}", alpha=0.35)
        panels[0, column].set_xscale("log", base=2)
        panels[0, column].set_xlabel("TFLOP an image at SD1.5's shapes")
        panels[1, column].set_xlabel("diversity")
        for panel in panels[:, column]:
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    return drawn


def verdict(row: Mapping[str, Any], key: str) -> str:
    """Whether a point gains over best-of-n in each reward, and what diversity it loses: by the intervals of the differences under `key`."""
    parts: list[str] = []
    for axis in (*(axis for axis, _ in _AXES), "diversity"):
        mean, low, high = row[key][axis]
        word = "more" if low > 0 else "less" if high < 0 else "no clear difference in"
        parts.append(f"{word} {axis} ({mean:+.2f}, {low:+.2f} to {high:+.2f})")
    return f"{row['method']}, {row['cost']['model']} model calls, {row['tflop']:.0f} TFLOP: {', '.join(parts)}"


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points in Markdown."""
    rows = _cells(points)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def _html(points: Sequence[Mapping[str, Any]]) -> str:
    header, *rows = _cells(points)
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _cells(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    header = [
        "method",
        "model calls",
        "decodes",
        "reward calls",
        "TFLOP",
        *_COLUMNS,
        "held-out − best-of-n at equal calls, 95 %",
        "… at equal TFLOP",
    ]
    rows: list[list[str]] = [header]
    for row in points:
        cells = [row["method"], *(str(row["cost"][name]) for name in ("model", "decodes", "rewards"))]
        cells += [f"{row['tflop']:.0f}", *(f"{row[name]:.2f}" for name in _COLUMNS)]
        for key in ("against", "at_cost"):
            difference = row.get(key, {}).get("heldout")
            cells.append("" if difference is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference))
        rows.append(cells)
    return rows
