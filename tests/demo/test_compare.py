"""The comparison: every method trains on the embedded model, the page and the figures are whole, a second call only judges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tools.embedded import tables
from trainer.config import ConfigError
from trainer.demo import compare, experiment
from trainer.demo.compare import METHODS, Size

TINY = Size(budget=60, batch=2, prompts=2, per_prompt=2, watched=1, points=1, real=8)


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown method 'reflx'.*sqdf"):
        compare.compare(["reflx"], tmp_path, TINY, 0)


def test_every_method_has_settings_that_its_objective_takes(tmp_path):
    for name in METHODS:
        compare.train_config(name, tmp_path, TINY, 0)


@pytest.mark.slow
def test_methods_are_trained_judged_and_left_alone_the_second_time(tmp_path, monkeypatch):
    names = ["srpo", "sqdf"]
    results = compare.compare(names, tmp_path, TINY, 0, quick=True)
    assert list(results["curves"]) == names and results["n"] == 4
    assert {(p["model"], p["k"]) for p in results["points"]} == {(f"{n}{b}", k) for n in names for b in ("", " best") for k in (0, 12)}
    assert {"base", "base_unguided", "points", "frontier", "seed", "n", "ci", "config", "curves", "seconds", "peak_rss_mb"} <= set(results)
    assert all(c["calls"] >= TINY.budget for c in results["cost"].values()) and "kl" in results["cost"]["sqdf"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64") == 2 + 2 + 2 * len(names) and "SRPO" in page and "quick comparison" in page
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["points"] == results["points"]

    logs = {name: (tmp_path / "runs" / name / "log.jsonl").read_text() for name in names}
    again = compare.compare(names, tmp_path, TINY, 0)
    assert again["points"] == results["points"]
    assert logs == {name: (tmp_path / "runs" / name / "log.jsonl").read_text() for name in names}
    tables.write([tmp_path, tmp_path], tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert (tmp_path / "tables-frontier.png").is_file() and (tmp_path / "tables-curves.png").is_file()
    assert "| SRPO best | 12 |" in text and "| SQDF | proxy |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft-k", "drtune", "direct-align"])
def test_one_update_of_a_method_moves_every_adapter(name, tmp_path):
    from safetensors.torch import load_file

    samples = experiment.renders(4, 0)
    config = replace(compare.train_config(name, tmp_path, TINY, 0), budget=1)
    experiment.train(config, samples, ["a red star"], compare.rewards())
    lora = load_file(tmp_path / "lora.safetensors")
    assert all(float(v.abs().max()) > 0 for k, v in lora.items() if k.endswith("lora_up.weight"))
