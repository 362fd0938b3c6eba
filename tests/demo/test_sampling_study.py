"""The comparison of searches: what is compared costs the same, and the page says what beats best-of-n."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trainer.__main__ import main
from trainer.demo import sampling_page, sampling_study
from trainer.metrics.study import BASE
from trainer.search.plan import Counts
from trainer.search.settings import METHODS


def test_every_method_spends_its_budget_and_no_more():
    budgets = (2, 4, 8, 16)
    spent = sampling_study.costs(sampling_study.searches(list(METHODS), budgets), budgets)
    assert spent[BASE].model == 20 and len(spent) == 1 + 4 * (len(METHODS) + 1)
    for (name, b), counts in list(spent.items())[1:]:
        assert 0.75 * b * 20 <= counts.model <= b * 20, (name, b, counts)
        assert counts.decodes <= counts.model and counts.rewards <= counts.decodes


def row(method, gain, low, high):
    figures = dict.fromkeys(("reward", "heldout", "gold", "diversity", "match", "fid"), 1.0)
    cost, ci = {"model": 40, "decodes": 2, "rewards": 2}, {name: [0.9, 1.1] for name in figures}
    return {
        "method": method,
        "budget": 2,
        "cost": cost,
        **figures,
        "tflop": 72.4,
        "ci": ci,
        "against": {name: [gain, low, high] for name in figures},
    }


def test_a_method_beats_best_of_n_where_the_interval_of_the_difference_does():
    assert "more heldout (+0.20, +0.10 to +0.30)" in sampling_page.verdict(row("svdd", 0.2, 0.1, 0.3), "against")
    assert "less gold" in sampling_page.verdict(row("svdd", -0.2, -0.3, -0.1), "against")
    assert "no clear difference in reward" in sampling_page.verdict(row("svdd", 0.2, -0.1, 0.5), "against")
    table = sampling_page.table([row("base", 0, 0, 0), row("svdd", 0.2, 0.1, 0.3)]).splitlines()
    assert table[3].startswith("| svdd | 40 | 2 | 2 | 72 | 1.00 |") and table[3].endswith("| +0.20 (+0.10 to +0.30) |  |")


def test_best_of_n_is_interpolated_where_its_arithmetic_equals_a_points():
    """Rewards linear in log TFLOP: then the interpolated best-of-n lies on that line, whatever lies between its budgets."""
    spent = {BASE: Counts(20, 1, 0), ("best-of-n", 2): Counts(40, 2, 2), ("best-of-n", 8): Counts(160, 8, 8)}
    spent |= {("svdd", 2): Counts(40, 38, 38), ("svdd", 8): Counts(160, 152, 152)}

    def judged(point):
        value = torch.tensor([1.0, 3.0]) * math.log(sampling_study.tflop(spent[point])) + (point[0] == "svdd")
        return dict.fromkeys(sampling_study.FIGURES, value)

    summary = {"base": {"fid": 1.0}, "points": [{"model": m, "k": b, "fid": 1.0} for m, b in spent if (m, b) != BASE]}
    rows = sampling_study._points({0: {point: judged(point) for point in spent}}, {0: summary}, spent)
    few, many = (next(row for row in rows if row["method"] == "svdd" and row["budget"] == b) for b in (2, 8))
    assert few["at_cost"]["gold"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5) and few["against"]["gold"][0] > 1.5
    assert "at_cost" not in many, "it costs more than the largest best-of-n"


@pytest.mark.parametrize(
    ("more", "message"),
    [(["walk"], "unknown search 'walk': use some of best-of-n"), (["--budgets", "1"], "--budgets, --prompts and -n: give at least 2")],
)
def test_bad_input_is_refused_in_one_line(tmp_path, more, message, capsys):
    assert main(["compare-sampling", *more, "--out", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.full
def test_a_small_comparison_writes_its_page_and_a_second_call_draws_nothing(tmp_path, monkeypatch):
    arguments = ["compare-sampling", "code", "--quick", "--out", str(tmp_path / "a")]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [point["method"] for point in results["points"]] == ["base", "more steps", "best-of-n", "code"]
    code = results["points"][3]
    assert code["ci"]["reward"][0] <= code["reward"] <= code["ci"]["reward"][1] and len(code["seeds"]["gold"]) == 2
    assert {"report.html", "figure.png", "table.md"} <= {path.name for path in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(sampling_study, "draw", lambda *_: pytest.fail("drawn again"))
    assert main(arguments) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["points"] == results["points"]
