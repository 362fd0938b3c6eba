"""Every preset for a published family trains a step on a small random model of that family, with nothing but paths and sizes changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config import build, override, read_toml
from trainer.lora.file import save_lora
from trainer.memory.planner import Planner
from trainer.models.load import load_policy
from trainer.policy import Lora
from trainer.runtime.processes import ALONE
from trainer.training.config import TrainConfig

FOLDER = Path(__file__).parent.parent.parent / "presets"
FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "sd35": "sd3", "flux": "flux-dev"}
PRESETS = [path for path in sorted(FOLDER.glob("*.toml")) if not path.stem.endswith("-demo")]


def test_every_family_has_the_same_presets():
    methods = {family: {p.stem.removesuffix("-" + family) for p in PRESETS if p.stem.endswith("-" + family)} for family in FAMILIES}
    assert all(found == methods["sd15"] for found in methods.values())
    assert len(list(FOLDER.glob("*.toml"))) <= 20


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*-demo.toml")), ids=lambda p: p.stem)
def test_a_preset_of_the_embedded_model_is_planned(preset):
    config = build(TrainConfig, read_toml(preset))
    found = Planner(ALONE)(config)
    assert ("evaluation" in found.phases) == (config.watch.every > 0) and found.phases["training step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_trains(preset, family_folder, reward_folder, image_folder, tmp_path, capsys):
    family = FAMILIES[preset.stem.rsplit("-", 1)[1]]
    changes = {"model": family_folder(family), "reward": reward_folder, "watch.heldout": reward_folder, "out": tmp_path / "run"}
    changes |= {"device": "cpu", "steps": 1, "gradient_accumulation_steps": 1, "batch_size": 1, "image_size": 64, "watch.every": 0}
    if "images =" in preset.read_text("utf-8"):
        changes["images"] = image_folder
    else:
        changes["prompts"] = tmp_path / "prompts.txt"
        changes["prompts"].write_text("a red star\n")
    if "consistency =" in preset.read_text("utf-8"):
        changes["consistency"] = tmp_path / "lcm.safetensors"
        policy = load_policy(family_folder(family))
        policy.add_lora(Lora())
        save_lora(policy, changes["consistency"], {})
    given = [f"--{key}={value}" for key, value in changes.items()]
    if preset.stem.startswith("sqdf"):  # with its second adapter
        assert Planner(ALONE)(build(TrainConfig, override(read_toml(preset), given))).phases["training step"] > 0
    code = main(["train", str(preset), *given])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "lora.safetensors").is_file()
