"""TPO's wrong captions: rules, files, and what a resumed run must share."""

from __future__ import annotations

import pytest
from helpers.family import Family

from trainer.objectives import TPO, RunContext
from trainer.objectives.preference.perturb import perturb, read_perturbed


@pytest.mark.parametrize(
    ("caption", "allowed"),
    [
        ("a red cube and a blue ball", "a (red|blue|yellow|green|cyan|purple|white|grey|black|brown) [a-z]+ and a [a-z]+ ball"),
        ("An orange cat", "A [a-z]+ cat|An orange [a-z]+"),
        ("Two men on the LEFT", "(One|Three|Four|Five|Six) men on the LEFT|Two women on the LEFT|Two men on the Right"),
        ("ein Haus am Meer", None),
        ("", None),
    ],
)
def test_a_rule_changes_one_thing(caption, allowed):
    import re

    found = perturb(caption)
    assert found == perturb(caption)
    if allowed is None:
        assert found is None
    else:
        assert found != caption and re.fullmatch(allowed, found), found


def test_captions_that_cannot_be_perturbed_are_refused_or_given(tmp_path):
    with pytest.raises(
        ValueError, match=r"no rule changes the caption 'ein Haus' \(and 1 more\): give wrong captions in objective.captions_"
    ):
        TPO().check(RunContext(Family(), prompts=("a red star", "ein Haus", "")))
    table = tmp_path / "wrong.csv"
    table.write_text("prompt,perturbed\nein Haus,ein Schiff\na red star,a red ring\n", "utf-8")
    objective = TPO(captions_file=str(table))
    objective.check(RunContext(Family(), prompts=("a red star", "ein Haus")))
    assert objective.captions(["ein Haus", "a red star"]) == ["ein Haus", "a red star", "ein Schiff", "a red ring"]
    table.write_text("prompt,perturbed\nein Haus,ein Haus\n", "utf-8")
    read_perturbed.cache_clear()
    with pytest.raises(ValueError, match=r"wrong.csv, line 2: give a prompt, and another text in the column perturbed"):
        objective.captions(["ein Haus"])


def test_a_resumed_run_refuses_other_wrong_captions(tmp_path):
    prompts = ("ein Haus",)
    states = []
    for other in ("Schiff", "Boot"):
        table = tmp_path / f"{other}.csv"
        table.write_text(f"prompt,perturbed\nein Haus,ein {other}\n", "utf-8")
        loss = TPO(captions_file=str(table)).begin(RunContext(Family(), prompts=prompts))
        states.append(loss.state())
    loss.restore(states[1])
    with pytest.raises(ValueError, match="holds other captions than when the run began"):
        loss.restore(states[0])
