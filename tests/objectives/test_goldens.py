"""Losses and gradients of all ten objectives in float64 against version 0.1.0's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.revisions import present
from tools.revisions.cases import CASES, figures

DATA = Path(__file__).parent.parent / "data" / "v010"
GOLDENS = json.loads((DATA / "gradients.json").read_text("utf-8"))
PRECISION = 1e-12  # another processor, or other kernels, give differences of up to 2e-13


@pytest.fixture(scope="module")
def embedded():
    return present.open_policy(DATA / "draft-lv" / "lora.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_an_objective_has_the_loss_and_the_gradient_that_it_had(name, embedded):
    golden, found = GOLDENS[name], figures(present.run(embedded, CASES[name]))
    assert found["loss"] == pytest.approx(golden["loss"], abs=PRECISION, rel=PRECISION)
    assert found["norm"] == pytest.approx(golden["norm"], rel=PRECISION)
    assert found["projections"] == pytest.approx(golden["projections"], abs=PRECISION * golden["norm"], rel=0)
    assert found["logs"].keys() == golden["logs"].keys()
    for log, values in found["logs"].items():
        assert values == pytest.approx(golden["logs"][log], abs=PRECISION, rel=PRECISION), log


def test_every_objective_of_that_version_has_a_case_with_guidance_and_one_without():
    guided = {case.objective for case in CASES.values() if case.settings.get("guidance") == 2.0}
    plain = {case.objective for case in CASES.values() if case.settings.get("guidance", 1.0) == 1.0}
    assert guided == plain == {case.objective for case in CASES.values()}
