"""One self-contained HTML page of results: the demo's overview and claim, or a comparison of methods; figures, curves and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics.study import BASE, Point
from ..runtime.files import write_text
from . import verdict
from .charts import AXES, OVERVIEW, SHOWN, curves_figure, frontier_figure, overview, png, sheet, strip, title
from .experiment import START, STEPS, UNGUIDED, Evaluated

COLUMNS = ("reward", "heldout", "gold", "relative", "diversity", "match", "fid", "logcov")


def write_demo(out: Path, results: Mapping[str, Any], evaluated: Evaluated) -> None:
    """Write `results.json`, `report.html`, and the overview for a README, `overview.png` and, for a phone, `overview-narrow.png`."""
    prompts = evaluated.prompts
    seeds = prompts.count(prompts[0])
    strips = {
        caption: [strip(evaluated.images[point][row * seeds : (row + 1) * seeds]) for row in range(min(SHOWN, len(prompts) // seeds))]
        for caption, point in OVERVIEW.items()
    }
    notes = _notes(results)
    _write(
        out,
        results,
        kind="demo",
        heading="Reward up, diversity kept?",
        summary=verdict.run_sentence(results["claim"]),
        experiment=verdict.experiment_sentence(verdict.load(), results["claim"]["direction"], len(prompts) // seeds),
        frontiers={label: png(frontier_figure(results, [(axis, label)])) for axis, label in AXES if axis in verdict.CO_PRIMARY},
        rows=[(prompt, [(c, notes[c], png(strips[c][i])) for c in strips]) for i, prompt in enumerate(_first(prompts))],
    )
    for name, narrow in (("overview", False), ("overview-narrow", True)):
        overview(strips, notes, narrow=narrow).savefig(out / f"{name}.png", dpi=100)


def _notes(results: Mapping[str, Any]) -> dict[str, str]:
    """Gain and diversity of each column of the overview."""
    base, points = results["base"], {(p["model"], p["k"]): p for p in results["points"]}
    found: dict[str, str] = {}
    for caption, point in OVERVIEW.items():
        row = base if point == BASE else points[point]
        gain = f"held-out {row['heldout'] - base['heldout']:+.2f}, ".replace("-0", "−0").replace("-1", "−1")
        found[caption] = f"{'' if point == BASE else gain}diversity {100 * row['diversity'] / base['diversity']:.0f} %"
    return found


def write_comparison(out: Path, results: Mapping[str, Any], evaluated: Evaluated, heading: str, summary: str) -> None:
    """Write `results.json` and `report.html`."""
    prompts = evaluated.prompts
    sheets: dict[str, Point] = {title("base"): BASE, title("base_unguided"): UNGUIDED}
    for name in results["curves"]:
        sheets |= {f"{title(name)} alone": (name, 0), f"{title(name)} after {START} steps of the base": (name, START)}
    drawn = {caption: png(sheet(evaluated.images[point], prompts.count(prompts[0]))) for caption, point in sheets.items()}
    frontiers = {"": png(frontier_figure(results))}
    _write(out, results, kind="comparison", heading=heading, summary=summary, frontiers=frontiers, sheets=drawn, prompts=_first(prompts))


def _first(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prompts))[:SHOWN]


def _write(out: Path, results: Mapping[str, Any], **values: Any) -> None:
    import torch
    from jinja2 import Environment

    write_text(json.dumps(results, indent=1) + "\n", out / "results.json")
    template = Environment(autoescape=True, trim_blocks=True).from_string(Path(__file__).with_name("page.html.j2").read_text("utf-8"))
    page = template.render(
        results=results,
        steps=STEPS,
        start=START,
        title=title,
        torch=str(torch.__version__).split("+")[0],
        table=[*({"model": name, "k": STEPS, **results[name]} for name in ("base", "base_unguided")), *results["points"]],
        columns=[name for name in COLUMNS if name in results["base"]],
        curves=png(curves_figure(results["curves"])),
        settings=json.dumps(results["config"], indent=1),
        **values,
    )
    write_text(page, out / "report.html")
