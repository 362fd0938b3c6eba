"""Every objective takes a step of the demo model on the fake device, to the CPU's loss and weights."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
from fake_device.runs import on_cpu, on_fake, same_run

STARTS = "--objective.grad_from=4 --objective.grad_to=7 --objective.steps=8"
OBJECTIVES = {
    "refl": f"{STARTS} --objective.kl_weight=0.1",
    "imagerefl": f"{STARTS} --objective.start_from=2 --objective.start_to=5",
    "draft-k": "--objective.steps=5 --objective.k=2",
    "draft-lv": "--objective.steps=5",
    "alignprop": "--objective.steps=6 --objective.cut_mean=4.0",
    "drtune": "--objective.steps=6 --objective.early_stop=3 --objective.k=3",
    "flowbp-sparse": "--objective.steps=5 --objective.k=2",
    "flowbp-bridge": "--objective.steps=5 --objective.k=3",
    "flowbp-lagrange": "--objective.steps=5",
    "leapalign": "--objective.steps=5",
    "direct-align": "--objective.steps=4",
    "srpo": "--objective.steps=4 --objective.branch=both",
    "diffusion-dpo": "--pairs=demo --objective.sft_weight=0.1 --objective.prompt_dropout=0.5",
    "diffusion-kto": "--labels=demo",
    "mapo": "--pairs=demo --objective.levels=min-snr",
    "dspo": "--pairs=demo --objective.beta=0.5",
    "dmpo": "--pairs=demo",
    "inpo": "--pairs=demo --objective.inversion_steps=3",
    "smpo": "--pairs=demo --objective.inversion_steps=3",
    "diffusion-npo": "--pairs=demo",
    "chats": "--pairs=demo",
    "tpo": "--objective.form=kto",
    "ddpo": "--objective.steps=4 --objective.group=2 --objective.prompts_per_round=1 --objective.kl_weight=0.1",
    "flow-grpo": "--objective.steps=4 --objective.noise_kind=cps --objective.group=2 --objective.prompts_per_round=1",
    "g2rpo": "--objective.steps=4 --objective.branch_steps=2 --objective.group=2 --objective.prompts_per_round=1",
    "awm": "--objective.steps=4 --objective.group=2 --objective.prompts_per_round=1 --objective.levels=2",
    "diffusion-nft": "--objective.steps=4 --objective.group=2 --objective.prompts_per_round=1",
    "spo": "--objective.steps=4 --objective.first_step=1 --objective.prompts_per_round=1 --objective.gap=0.05",
    "pso": "--objective.steps=3 --objective.prompts_per_round=1",
    "self-npo": "--objective.levels=6 --objective.rollout_steps=2 --objective.anti_guidance=-2.0",
    "dro": "--objective.rollout_steps=3",
    "sqdf": "--objective.steps=5 --objective.buffer_gb=0.1 --objective.estimator=consistency --consistency=demo",
    "sqdf-black-box": "--objective.steps=5 --objective.buffer_gb=0.1 --objective.queries=[8] --objective.epochs=2 "
    "--objective.optimism=ucb --features=demo-heldout --reward=demo-gold",
}

FULL = {
    "flow-grpo",
    "g2rpo",
    "diffusion-nft",
    "chats",
    "spo",
    "diffusion-npo",
    "mapo",
    "dspo",
    "dmpo",
    "inpo",
    "dro",
    "self-npo",
    "flowbp-sparse",
    "flowbp-lagrange",
    "leapalign",
}  # near others that run by default


def arguments(name, out):
    data = [] if "=demo " in f"{OBJECTIVES[name]} ".partition("--objective")[0] else ["--images=demo"]
    return ["train", f"--out={out}", *data, "--batch_size=2", "--steps=1", f"--objective.name={name}", *OBJECTIVES[name].split()]


@cache
def expected(name) -> Path:
    """The same step on the CPU."""
    out = Path(tempfile.mkdtemp()) / "run"
    on_cpu(*arguments(name, out))
    return out


def test_all_objectives_are_here():
    from trainer.objectives import OBJECTIVES as known

    assert OBJECTIVES.keys() == known.keys()


# `mps` refuses all that `cuda` refuses
@pytest.mark.parametrize("mode", ["mps", pytest.param("cuda", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] if name in FULL else []) for name in OBJECTIVES])
def test_a_step_is_that_of_the_cpu(name, mode, tmp_path):
    on_fake(mode, *arguments(name, tmp_path / "run"))
    same_run(tmp_path / "run", expected(name))
