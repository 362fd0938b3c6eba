"""Which models are taken to be distilled, and that training one as any other is said once."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from helpers.runs import plan_config, settings

from trainer.__main__ import main
from trainer.commands import train
from trainer.models.distilled import distilled
from trainer.models.load import load_policy
from trainer.models.meta import meta_policy
from trainer.training.presets import ROWS


def changed(folder, path, file, **values):
    """A copy of a diffusers folder with other values in one of its JSON files."""
    shutil.copytree(folder, path)
    json_file = path / file
    json_file.write_text(json.dumps(json.loads(json_file.read_text()) | values))
    return path


def reason(folder):
    return distilled(meta_policy(folder, image_size=64), str(folder))


SCHEDULER = "scheduler/scheduler_config.json"
STATED = [
    ("z-image", SCHEDULER, {"shift": 3.0}, "its shift of 3 is Z-Image-Turbo's"),
    ("krea2", "model_index.json", {"is_distilled": True}, "is_distilled in its pipeline"),
    ("klein", "model_index.json", {"is_distilled": True}, "is_distilled in its pipeline"),
    ("sd15", SCHEDULER, {"timestep_spacing": "trailing"}, "trailing timesteps without zero terminal SNR, as SDXL-Turbo"),
    ("sd15", "model_index.json", {"_name_or_path": "stabilityai/sd-turbo"}, "its name says turbo"),
]


@pytest.mark.parametrize(("family", "file", "values", "expected"), STATED, ids=[f"{c[0]}-{c[3][:12]}" for c in STATED])
def test_what_the_files_state(family, file, values, expected, family_folder, tmp_path):
    folder = family_folder(family)
    assert reason(folder) == "" and reason(changed(folder, tmp_path / "model", file, **values)) == expected


def test_schedulers_and_names(family_folder, pipeline_folder, tmp_path):
    assert reason(family_folder("flux-dev")) == "" and "as FLUX.1 schnell" in reason(family_folder("flux-schnell"))
    zero = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert reason(changed(pipeline_folder, tmp_path / "vpred", SCHEDULER, **zero)) == ""
    lcm = changed(pipeline_folder, tmp_path / "consistent", SCHEDULER, _class_name="LCMScheduler")
    index = json.loads((lcm / "model_index.json").read_text())
    (lcm / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    assert reason(lcm) == "its scheduler is LCM's" == distilled(load_policy(lcm), str(lcm))
    policy = meta_policy(pipeline_folder)
    names = {
        "sdxl-turbo": "turbo",
        "z_image_turbo_bf16": "turbo",
        "dreamshaperXL_v21TurboDPMSDE": "turbo",
        "juggernautXL_v9Rdphoto2Lightning": "lightning",
        "LCM_Dreamshaper_v7": "lcm",
        "flux-2-klein-9b": "flux-2-klein-9b",
        "flux-2-klein-base-9b": "",
        "Z-Image-De-Turbo": "",
        "sd_xl_base_1.0": "",
        "calcmodel": "",
    }
    for name, found in names.items():
        (tmp_path / f"{name}.safetensors").touch()
        assert distilled(policy, str(tmp_path / f"{name}.safetensors")) == (f"its name says {found.lower()}" if found else ""), name
    cached = tmp_path / "models--stabilityai--sd-turbo" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert distilled(policy, str(cached)) == "its name says turbo"


@pytest.mark.full
def test_the_published_ones_are_those_of_few_steps():
    assert {name: bool(distilled(meta_policy(name), name)) for name in ROWS} == {name: row.few for name, row in ROWS.items()}


def test_it_is_said_once_at_the_start_and_by_the_plan(pipeline_folder, reward_folder, image_folder, tmp_path, caplog):
    folder = shutil.copytree(pipeline_folder, tmp_path / "sd-turbo")

    def said(out, *flags):
        caplog.clear()
        assert main(["train", *settings(folder, reward_folder, image_folder, tmp_path / out, steps=1), *flags]) == 0
        return [r.message for r in caplog.records if r.levelno == logging.WARNING and "distilled" in r.message]

    expected = f"warning: {folder} is distilled to few steps (its name says turbo), which training undoes: train its base model and draw "
    for flags in ([], ["--plan"]):
        (line,) = said("run", *flags)
        assert line.startswith(expected) and "training_adapter = FILE" in line and "\n" not in line
    caplog.clear()
    for remedy in ({"training_adapter": "a.safetensors"}, {"watch": {"tuned_model": "base", "tuned_steps": 2}}):
        train._warn(plan_config(model=str(folder), **remedy), meta_policy(folder))
    assert not caplog.records
