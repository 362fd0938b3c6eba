"""Figures of an evaluation: reward against diversity, FID and LogCov over switches, and every metric over training steps.

These are the forms of Figures 1, 2 and 5 of ImageReFL (arXiv:2505.22569). Panels stand below one another, so that a figure is
legible on a phone: 390 px wide, a font of 11 px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.files import replacing

Results = Mapping[str, Any]
METRICS = {"diversity": "diversity", "fid": "FID", "logcov": "LogCov"}
_LOWER_IS_BETTER = {"fid", "logcov"}
_WIDTH, _HEIGHT, _DPI = 3.9, 3.0, 200  # inches of a panel; dots per inch


@dataclass(frozen=True)
class Curve:
    """The checkpoints of one training run: (step, model's name in the results), by step. A LoRA of unknown step has step 0."""

    name: str
    models: Sequence[tuple[int, str]]


def curves(results: Results) -> list[Curve]:
    """The runs of an evaluation. Results without `checkpoints` (of 0.2.0) have a run for each model."""
    found: dict[str, list[tuple[int, str]]] = {}
    for model in dict.fromkeys(point["model"] for point in results["points"]):
        checkpoint = results.get("checkpoints", {}).get(model, {})
        found.setdefault(checkpoint.get("run", model), []).append((checkpoint.get("step") or 0, model))
    return [Curve(name, sorted(models)) for name, models in found.items()]


def write(results: Results, out: Path) -> list[Path]:
    """Write `<out>.tradeoff.png` and, where a run has several checkpoints, `<out>.training.png`; returns their paths."""
    figures = {"tradeoff": tradeoff_figure(results)}
    if any(len(curve.models) > 1 for curve in curves(results)):
        figures["training"] = training_figure(results)
    for kind, figure in figures.items():
        with replacing(paths(out)[kind]) as partial:
            figure.savefig(partial, dpi=_DPI, format="png")
    return [paths(out)[kind] for kind in figures]


def paths(out: Path) -> dict[str, Path]:
    """Where the figures of the results in `out` lie, by kind."""
    return {kind: out.with_suffix(f".{kind}.png") for kind in ("tradeoff", "training")}


def tradeoff_figure(results: Results) -> Any:
    """Each reward against diversity, FID and LogCov: one line per run over its switches k; better is up and to the right.

    The last checkpoint of a run has 95 % intervals and names its switches; earlier ones are thin.
    """
    pairs = [(reward, metric) for reward in _rewards(results) for metric in METRICS]
    figure, panels = _stacked(len(pairs))
    for panel, (reward, metric) in zip(panels, pairs):
        for number, curve in enumerate(curves(results)):
            for _, model in curve.models[:-1]:
                points = _points(results, model)
                x, y = _values(points, _column(results, metric)), _values(points, reward)
                panel.plot(x, y, "-", color=f"C{number}", linewidth=0.7, alpha=0.35)
            _line_over_switches(panel, results, curve, f"C{number}", _column(results, metric), reward)
        _base_point(panel, results, _column(results, metric), reward)
        panel.set_xlabel(_label(results, metric) + (" (lower is better, axis reversed)" if metric in _LOWER_IS_BETTER else ""))
        panel.set_ylabel(_short(reward))
        if metric in _LOWER_IS_BETTER:
            panel.invert_xaxis()
    _legend(figure, panels[0])
    return figure


def training_figure(results: Results) -> Any:
    """Each reward, diversity, FID and LogCov over training steps: one line per run and switch k, 95 % intervals, the base dotted.

    Of more than two switches the first and the middle one are drawn.
    """
    columns = [*((r, _short(r)) for r in _rewards(results)), *((_column(results, m), _label(results, m)) for m in METRICS)]
    figure, panels = _stacked(len(columns))
    switches = sorted({point["k"] for point in results["points"]})
    switches = switches if len(switches) <= 2 else [switches[0], switches[len(switches) // 2]]
    steps = [step for curve in curves(results) if len(curve.models) > 1 for step, _ in curve.models]
    for panel, (column, label) in zip(panels, columns):
        for number, curve in enumerate(curves(results)):
            for k, marker in zip(switches if len(curve.models) > 1 else (), "os"):
                _line_over_steps(panel, results, curve, k, f"C{number}", column, marker)
        if column in results["base"]:
            panel.plot([min(steps), max(steps)], [results["base"][column]] * 2, ":", color="#444444", linewidth=1, label="base")
        panel.set_xlabel("optimizer step")
        panel.set_title(label + (" (lower is better)" if column.endswith(tuple(_LOWER_IS_BETTER)) else ""), fontsize=9)
    _legend(figure, panels[0])
    return figure


def _line_over_switches(panel: Any, results: Results, curve: Curve, colour: str, column: str, reward: str) -> None:
    step, model = curve.models[-1]
    points = _points(results, model)
    x, y = _values(points, column), _values(points, reward)
    bars = {"xerr": _bars(results, model, points, column), "yerr": _bars(results, model, points, reward)}
    name = f"{curve.name}, step {step}" if len(curve.models) > 1 else curve.name
    panel.errorbar(
        x, y, **bars, fmt="o-", color=colour, ecolor=colour, elinewidth=0.6, capsize=1.5, markersize=3.5, linewidth=1, label=name
    )
    place = (4, 4) if colour == "C0" else (4, -9)  # two runs' labels on either side
    for x0, y0, point in zip(x, y, points):
        panel.annotate(f"k={point['k']}", (x0, y0), textcoords="offset points", xytext=place, fontsize=7, color=colour)


def _line_over_steps(panel: Any, results: Results, curve: Curve, k: int, colour: str, column: str, marker: str) -> None:
    here = [(step, point) for step, model in curve.models for point in _points(results, model) if point["k"] == k]
    x, y = [step for step, _ in here], [point[column] for _, point in here]
    panel.plot(
        x, y, f"{marker}-", color=colour, markersize=3.5, linewidth=1, fillstyle="full" if k == 0 else "none", label=f"{curve.name}, k={k}"
    )
    bounds = [_interval(results, point["model"], k, column) or (point[column], point[column]) for _, point in here]
    panel.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.13, linewidth=0)


def _base_point(panel: Any, results: Results, column: str, reward: str) -> None:
    """The base model; its distance to itself, where it is the reference, is 0."""
    x, y = results["base"].get(column, 0.0), results["base"][reward]
    bars = [_around(_interval(results, "base", None, name), value) for name, value in ((column, x), (reward, y))]
    style = {"color": "#444444", "elinewidth": 0.6, "capsize": 1.5, "markersize": 8, "label": "base"}
    panel.errorbar([x], [y], xerr=bars[0], yerr=bars[1], fmt="*", **style)


def _stacked(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * count), layout="constrained")
    panels = list(figure.subplots(count, 1, squeeze=False).flatten())
    for panel in panels:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)  # numbers of four decimals stay apart
        panel.xaxis.label.set_size(8)
        panel.yaxis.label.set_size(8)
        panel.margins(0.12)
    return figure, panels


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=1 if max(map(len, labels)) > 24 else 2, fontsize=8, frameon=False)


def _rewards(results: Results) -> list[str]:
    return list(next(iter(results["frontier"].values())))


def _feature(results: Results) -> str:
    """The extractor that is drawn: DINO, as in the paper, or else the first."""
    return "dino" if "dino" in results["features"] else results["features"][0]


def _column(results: Results, metric: str) -> str:
    """A metric's name in the results: without prefix for the first extractor."""
    return metric if _feature(results) == results["features"][0] else f"{_feature(results)}_{metric}"


def _label(results: Results, metric: str) -> str:
    return f"{METRICS[metric]} of {_short(_feature(results))} features"


def _short(name: str) -> str:
    """A path's last part."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _points(results: Results, model: str) -> list[dict[str, Any]]:
    return sorted((point for point in results["points"] if point["model"] == model), key=lambda point: point["k"])


def _values(points: Sequence[Mapping[str, float]], column: str) -> list[float]:
    return [point[column] for point in points]


def _interval(results: Results, model: str, k: int | None, column: str) -> tuple[float, float] | None:
    rows = (row for row in results["ci_absolute"] if row["model"] == model and row.get("k") == k)
    bounds = next(rows, {}).get(column)
    return (bounds[0], bounds[1]) if bounds else None


def _around(bounds: tuple[float, float] | None, value: float) -> list[list[float]]:
    """An interval as matplotlib's lengths below and above; they are 0 where it does not hold the value."""
    low, high = bounds or (value, value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _bars(results: Results, model: str, points: Sequence[Mapping[str, Any]], column: str) -> list[list[float]]:
    each = [_around(_interval(results, model, point["k"], column), point[column]) for point in points]
    return [[low[0] for low, _ in each], [high[0] for _, high in each]]
