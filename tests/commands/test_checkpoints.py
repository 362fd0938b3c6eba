"""The names of the checkpoints that `evaluate` compares."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from trainer.commands.checkpoints import checkpoints
from trainer.config import ConfigError


def lora(path, step=None):
    path.parent.mkdir(exist_ok=True)
    metadata = {} if step is None else {"imagerefl": json.dumps({"step": step})}
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    return path


def test_a_folder_gives_its_snapshots_and_its_later_result(tmp_path):
    for step in (30, 10, 20):
        lora(tmp_path / "refl" / f"lora-{step:06d}.safetensors", step)
    lora(tmp_path / "refl" / "lora.safetensors", 35)
    lora(tmp_path / "refl" / "best.safetensors", 20)
    alone = lora(tmp_path / "alone.safetensors")
    found = checkpoints([f"mine={tmp_path / 'refl'}", str(alone)])
    assert list(found) == ["mine@10", "mine@20", "mine@30", "mine@35", "alone"]
    assert [(c.run, c.step) for c in found.values()] == [("mine", 10), ("mine", 20), ("mine", 30), ("mine", 35), ("alone", None)]
    lora(tmp_path / "refl" / "lora.safetensors", 30)
    assert list(checkpoints([str(tmp_path / "refl")])) == ["refl@10", "refl@20", "refl@30"]


def test_files_of_one_name_are_one_run_where_they_say_their_steps(tmp_path):
    given = [f"a={lora(tmp_path / f'{step}.safetensors', step)}" for step in (9, 5)]
    assert list(checkpoints(given)) == ["a@5", "a@9"]
    for other in (given[0], f"a={lora(tmp_path / 'foreign.safetensors')}"):
        with pytest.raises(ConfigError, match="two models are called a: give --lora NAME=FILE"):
            checkpoints([*given, other])
    with pytest.raises(ConfigError, match="two models are called base"):
        checkpoints([f"base={tmp_path / '5.safetensors'}"])


def test_a_folder_without_a_lora_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no LoRA: give a file, or the folder of a run with snapshot_every"):
        checkpoints([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        checkpoints([str(tmp_path / "none.safetensors")])
