"""What the demo says of the claim: the protocol's rule, and words for every sign."""

from __future__ import annotations

import json

import pytest

from tools.embedded import verdict as tool
from trainer.demo import verdict


@pytest.mark.parametrize(
    ("interval", "seeds", "word"),
    [
        ((0.2, 0.1, 0.3), 5, "true"),
        ((-0.2, -0.3, -0.1), 5, "false"),
        ((0.0, -0.05, 0.05), 5, "no difference"),
        ((0.1, -0.05, 0.3), 5, "undecided"),
        ((0.2, 0.1, 0.3), 4, "undecided (n = 4)"),
    ],
)
def test_the_verdict_is_the_protocols(interval, seeds, word):
    leads = {axis: [interval] * seeds for axis in verdict.CO_PRIMARY}
    assert verdict.decide(leads) == word
    if word == "true":
        leads["gold"][2] = (0.1, -0.01, 0.3)
        assert verdict.decide(leads) == "undecided"


@pytest.mark.parametrize(
    ("lead", "words"),
    [
        ((0.2, 0.1, 0.3), "ImageReFL leads: +0.20 [+0.10, +0.30]"),
        ((-0.2, -0.3, -0.1), "ImageReFL trails: −0.20 [−0.30, −0.10]"),
        ((0.0, -0.05, 0.05), "no difference: +0.00 [−0.05, +0.05]"),
        ((0.1, -0.05, 0.3), "undecided: +0.10 [−0.05, +0.30]"),
    ],
)
def test_the_sentence_of_a_run_follows_its_figures(lead, words):
    gains = {"refl": {"heldout": 0.5, "gold": -0.25}, "imagerefl": {"heldout": 0.7, "gold": 0.1}}
    said = verdict.run_sentence({"share": 0.85, "gains": gains, "leads": {"heldout": lead, "gold": lead}})
    assert said == (
        f"With at least 85 % of the base model's diversity, ImageReFL and ReFL gain in held-out reward +0.70 and +0.50 ({words}), "
        f"in gold reward +0.10 and −0.25 ({words})."
    )


def _experiment(word, seeds, tie=False):
    return {"verdict": word, "seeds": seeds, "tie": tie, "leads": {axis: [(0.3, 0.2, 0.4)] * seeds for axis in verdict.CO_PRIMARY}}


def test_a_run_that_differs_from_the_experiment_says_so():
    differs = "This run alone says: false. One small run can differ: it has one training seed and 40 prompts."
    assert verdict.experiment_sentence(_experiment("true", 5), "false", 40).endswith(differs)
    agrees = verdict.experiment_sentence(_experiment("true", 5), "true", 40)
    assert "differ" not in agrees and "held-out +0.30, +0.30, +0.30, +0.30, +0.30; gold +0.30" in agrees
    assert verdict.experiment_sentence(_experiment("undecided", 5, tie=True), "undecided", 40).startswith(
        "ReFL with the same diffusion loss"
    )
    assert "undecided (n = 3)" in verdict.experiment_sentence(_experiment("undecided (n = 3)", 3), "true", 40)
    assert "no result yet: undecided (n = 0)" in verdict.experiment_sentence(_experiment("undecided (n = 0)", 0), "true", 40)


def test_the_shipped_verdict_is_one_that_the_page_can_read():
    assert verdict.experiment_sentence(verdict.load(), "undecided", 40)
    assert tool.summary([])["verdict"] == "undecided (n = 0)"


def test_records_of_different_weights_are_not_mixed(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, digest in zip(paths, ("aaaa", "bbbb")):
        path.write_text(json.dumps({"weights": {"proxy": digest}}))
    with pytest.raises(ValueError, match=r"b\.json was made with another proxy: bbbb, .*a\.json with aaaa"):
        tool.read(paths)
