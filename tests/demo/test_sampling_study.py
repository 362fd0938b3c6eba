"""The comparison of searches: what is compared costs the same, and the page says what beats best-of-n."""

from __future__ import annotations

import json

import pytest

from trainer.__main__ import main
from trainer.demo import sampling_page, sampling_study
from trainer.metrics.study import BASE
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
    return {"method": method, "budget": 2, "cost": cost, **figures, "ci": ci, "against": {name: [gain, low, high] for name in figures}}


def test_a_method_beats_best_of_n_where_the_interval_of_the_difference_does():
    assert "more heldout (+0.20, +0.10 to +0.30)" in sampling_page.verdict(row("svdd", 0.2, 0.1, 0.3))
    assert "less gold" in sampling_page.verdict(row("svdd", -0.2, -0.3, -0.1))
    assert "no clear difference in reward" in sampling_page.verdict(row("svdd", 0.2, -0.1, 0.5))
    table = sampling_page.table([row("base", 0, 0, 0), row("svdd", 0.2, 0.1, 0.3)]).splitlines()
    assert table[3].startswith("| svdd | 40 | 2 | 2 | 1.00 |") and table[3].endswith("| +0.20 (+0.10 to +0.30) |")


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
