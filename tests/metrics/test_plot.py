"""The figures of an evaluation show its figures: lines, intervals, labels, and a size that a phone can show."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from trainer.metrics import plot

KS = (0, 12)


def value(step, k, column):
    """A figure of its own for each point."""
    return {"r": 1.0, "path/to/judge": 2.0, "diversity": 0.5, "fid": 30.0, "logcov": 7.0}[column] * (1 + step / 100 - k / 50)


@pytest.fixture
def results():
    """A run `a` with checkpoints at steps 10, 20 and 30, and a single LoRA `b`, at two switches."""
    columns = ("r", "path/to/judge", "diversity", "fid", "logcov")
    steps = {"a@10": ("a", 10), "a@20": ("a", 20), "a@30": ("a", 30), "b": ("b", None)}
    points = [{"model": m, "k": k, **{c: value(s or 0, k, c) for c in columns}} for m, (_, s) in steps.items() for k in KS]
    bounds = [{"model": p["model"], "k": p["k"], **{c: [p[c] - 0.1, p[c] + 0.2] for c in columns}} for p in points]
    base = {"r": 0.0, "path/to/judge": 0.1, "diversity": 0.9, "fid": 10.0, "logcov": 1.0}
    return {
        "base": base,
        "points": points,
        "ci_absolute": [{"model": "base", **{c: [v - 0.1, v + 0.1] for c, v in base.items()}}, *bounds],
        "frontier": {m: {"r": 1.0, "path/to/judge": 1.0} for m in steps},
        "features": ["reader"],
        "checkpoints": {m: {"run": run, "step": step} for m, (run, step) in steps.items()},
    }


def line(panel, label):
    """The points of a labelled line; a line with error bars is its container's first artist."""
    labelled = {h.get_label(): h for h in panel.get_legend_handles_labels()[0]}
    handle = labelled[label]
    return [[float(v) for v in values] for values in (handle[0] if isinstance(handle, tuple) else handle).get_data()], handle


def test_runs_are_sorted_by_step_and_old_results_have_one_per_model(results):
    assert plot.curves(results)[0].models == [(10, "a@10"), (20, "a@20"), (30, "a@30")]
    del results["checkpoints"]
    assert [curve.name for curve in plot.curves(results)] == ["a@10", "a@20", "a@30", "b"]


def test_the_tradeoff_has_one_line_per_run_over_its_switches_with_intervals(results):
    panels = plot.tradeoff_figure(results).axes
    assert [(p.get_ylabel(), p.get_xlabel().split(" of ")[0]) for p in panels] == [
        (reward, metric) for reward in ("r", "judge") for metric in ("diversity", "FID", "LogCov")
    ]
    (x, y), handle = line(panels[1], "a, step 30")
    assert x == [value(30, k, "fid") for k in KS] and y == [value(30, k, "r") for k in KS]
    across, up = (bars.get_segments() for bars in handle[2])
    assert across[0][:, 0] == pytest.approx([x[0] - 0.1, x[0] + 0.2]) and up[1][:, 1] == pytest.approx([y[1] - 0.1, y[1] + 0.2])
    assert panels[1].xaxis_inverted() and not panels[0].xaxis_inverted()  # better is to the right
    assert line(panels[0], "base")[0] == [[0.9], [0.0]] and line(panels[0], "b")[0][1] == [value(0, k, "r") for k in KS]
    assert {text.get_text() for text in panels[0].texts} == {"k=0", "k=12"}


def test_the_training_figure_has_one_line_per_run_and_switch_over_steps(results):
    panels = plot.training_figure(results).axes
    assert [p.get_title().split(" ")[0] for p in panels] == ["r", "judge", "diversity", "FID", "LogCov"]
    x, y = line(panels[3], "a, k=12")[0]
    assert x == [10, 20, 30] and y == [value(step, 12, "fid") for step in x]
    band = panels[3].collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((min(y) - 0.1, max(y) + 0.2))


def test_dino_is_drawn_where_it_was_measured(results):
    results["features"] = ["clip", "dino"]
    for row in (results["base"], *results["points"]):
        row |= {f"dino_{metric}": row[metric] / 2 for metric in plot.METRICS}
    panel = plot.tradeoff_figure(results).axes[0]
    assert line(panel, "b")[0][0] == [value(0, k, "diversity") / 2 for k in KS] and "dino" in panel.get_xlabel()


def test_the_files_are_as_wide_as_a_phone_and_their_texts_legible(results, tmp_path):
    paths = plot.write(results, tmp_path / "x.json")
    assert [p.name for p in paths] == ["x.tradeoff.png", "x.training.png"]
    for path in paths:
        width, _ = Image.open(path).size
        assert width == 780  # two pixels for each of 390
    for figure in (plot.tradeoff_figure(results), plot.training_figure(results)):
        figure.canvas.draw()
        shown = [
            text
            for panel in figure.axes
            for text in (*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label, *panel.get_xticklabels())
        ]
        pixels = [text.get_fontsize() / 72 * 390 / figure.get_figwidth() for text in shown]
        assert min(pixels) > 9.5, min(pixels)


def test_results_with_single_checkpoints_have_no_training_figure(results, tmp_path):
    results["points"] = [p for p in results["points"] if p["model"] in ("a@30", "b")]
    assert [p.name for p in plot.write(json.loads(json.dumps(results)), tmp_path / "x.json")] == ["x.tradeoff.png"]
