"""A held-out reward is not one that is trained on: refused in one line before any step."""

from __future__ import annotations

import shutil

import pytest
from helpers.runs import settings

from trainer.__main__ import main
from trainer.config import ConfigError, build
from trainer.training.config import TrainConfig
from trainer.training.parts import check_heldout

SAID = "watch.heldout = {heldout}: {why} trained on, so that it rises with over-optimisation"
WATCH = {"watch.every": 1, "watch.count": 1, "watch.images": 2, "watch.steps": 3, "watch.reference": "none"}


@pytest.mark.parametrize(
    ("objective", "reward", "heldout", "refused"),
    [
        ("ddpo", "demo-proxy", "demo-proxy", True),
        ("ddpo", "demo-gold=1, demo-proxy=0.5", "demo-proxy", True),
        ("ddpo", "demo-proxy", "demo-gold=1, demo-proxy=0.5", True),
        ("ddpo", "demo-gold=1, demo-proxy=0", "demo-proxy", False),  # an auxiliary reward is not trained on
        ("smpo", "demo-proxy", "demo-heldout", False),
        ("diffusion-dpo", "demo-proxy", "demo-proxy", False),  # learns from pairs alone
    ],
)
def test_by_name(objective, reward, heldout, refused):
    config = build(TrainConfig, {"out": "o", "objective": {"name": objective}, "reward": reward, "watch": {"every": 1, "heldout": heldout}})
    try:
        check_heldout(config, {})
        said = ""
    except ConfigError as error:
        said = str(error)
    assert said.startswith(SAID.format(heldout=heldout, why="demo-proxy is")) == refused and bool(said) == refused


def test_by_weights_under_another_name_before_the_model_is_opened(reward_folder, tmp_path, capsys):
    copy = shutil.copytree(reward_folder, tmp_path / "copy")
    values = {"watch.heldout": str(copy), "reward": f"demo-gold=1, {reward_folder}=0.5", **WATCH}
    for more, status, why in (([], 2, f"{copy} has the weights of {reward_folder}, which is"), (["--plan"], 2, "no model")):
        listed = settings(tmp_path / "no-model", reward_folder, tmp_path / "no-images", tmp_path / "out", **values)
        if more:
            listed = [one.replace(str(copy), str(reward_folder)) for one in listed]
            copy, why = reward_folder, f"{reward_folder} is"
        assert main(["train", *listed, *more]) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and SAID.format(heldout=copy, why=why) in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(pipeline_folder, reward_folder, image_folder, tmp_path, monkeypatch, caplog):
    """Which was watched by the reward that it trains on."""
    listed = settings(pipeline_folder, reward_folder, image_folder, tmp_path / "out", **{"watch.heldout": str(reward_folder), **WATCH})
    with monkeypatch.context() as patch:
        patch.setattr("trainer.commands.parts.check_heldout", lambda *_: None)
        assert main(["train", *listed, "--steps=1"]) == 0
    assert "is trained on" not in caplog.text
    assert main(["train", *listed, "--steps=2", "--resume"]) == 0
    assert SAID.format(heldout=reward_folder, why=f"{reward_folder} is") in caplog.text
