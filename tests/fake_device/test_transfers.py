"""How often a step waits for the device, and what it sends there."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import pytest
from fake_device.runs import DEVICE, run
from fake_device.strict import strict

from trainer.objectives import OBJECTIVES

STEPS = 12
SETTINGS = {  # and how many denoisers a loss makes: SQDF's are the rollout's, the transition's, its estimate's and the base's
    "refl": (1, [f"--objective.grad_from={STEPS - 4}", f"--objective.grad_to={STEPS - 1}"]),
    "draft-k": (1, ["--objective.k=2"]),
    "drtune": (1, ["--objective.k=3", "--objective.early_stop=2"]),
    "flowbp-bridge": (1, []),
    "sqdf": (4, ["--objective.buffer_gb=0"]),
}


class Measured:
    """A loss that opens a region for every call."""

    def __init__(self, loss, device, regions):
        self.loss, self.device, self.regions = loss, device, regions

    def __call__(self, *batch):
        with self.device.region() as region:
            self.regions.append(region)
            return self.loss(*batch)

    def __getattr__(self, name):
        return getattr(self.loss, name)


@contextmanager
def losses(name, device):
    """The regions in which the losses of a run are computed, one each; backward passes lie outside."""
    kind, regions = OBJECTIVES[name], []
    begin = kind.begin
    with patch.object(kind, "begin", lambda self, *context: Measured(begin(self, *context), device, regions)):
        yield regions


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("refl", 1.0),
        ("refl", 3.0),
        ("draft-k", 3.0),
        ("drtune", 3.0),
        pytest.param("flowbp-bridge", 3.0, marks=pytest.mark.full),
        ("sqdf", 3.0),
    ],
)
def test_a_rollout_reads_twice_at_most_and_a_denoiser_takes_its_prompts_once(name, guidance, tmp_path):
    denoisers, settings = SETTINGS[name]
    arguments = ["train", f"--out={tmp_path / 'run'}", "--images=demo", "--batch_size=3", "--steps=1", f"--objective.name={name}"]
    arguments += [f"--objective.steps={STEPS}", f"--objective.guidance_scale={guidance}", *settings]
    with strict("mps") as device, losses(name, device) as regions:
        run(DEVICE, *arguments)
    (region,) = regions
    assert region.reads <= 2, f"{region.reads} reads of a rollout of {STEPS} steps:\n{region}"
    conditioning = [t for t in region.of("upload") if len(t.shape) == 3]
    assert len(conditioning) == denoisers, f"{len(conditioning)} uploads of conditioning by {denoisers} denoisers:\n{region}"
