"""The names of the checkpoints that `evaluate` compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.commands.checkpoints import checkpoints, split_name
from trainer.config import ConfigError


def lora(path, step=None):
    path.parent.mkdir(parents=True, exist_ok=True)
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


def test_files_of_one_name_in_several_folders_are_called_after_their_folders(tmp_path):
    a, b, deep = (lora(tmp_path / run / "lora.safetensors", 5) for run in ("runA", "runB", "x"))
    (tmp_path / "y" / "runA").mkdir(parents=True)
    deep = deep.rename(tmp_path / "y" / "runA" / "lora.safetensors")
    assert list(checkpoints([str(a), str(b)])) == ["runA/lora", "runB/lora"]
    found = checkpoints([str(a), str(b), str(deep), f"mine={a}"])
    assert [(name, c.file) for name, c in found.items()] == [
        (f"{tmp_path.name}/runA/lora", a),
        ("runB/lora", b),
        ("y/runA/lora", deep),
        ("mine", a),
    ]
    with pytest.raises(ConfigError, match="is given twice"):
        checkpoints([str(a), str(tmp_path / "runB" / ".." / "runA" / "lora.safetensors")])


def test_no_file_takes_the_name_of_the_base_or_of_another_model(tmp_path):
    base, plain = lora(tmp_path / "run" / "base.safetensors"), lora(tmp_path / "run" / "plain.safetensors")
    assert list(checkpoints([str(base), str(plain), f"other={base}"])) == ["run/base", "plain", "other"]
    assert list(checkpoints([str(plain), f"plain={base}"])) == ["run/plain", "plain"]
    steps = [f"a={lora(tmp_path / f'{step}.safetensors', step)}" for step in (5, 9)]
    with pytest.raises(ConfigError, match="two models are called a@5: give --lora NAME=FILE"):
        checkpoints([*steps, f"a@5={plain}"])


def test_a_path_that_exists_is_a_path_whatever_signs_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = lora(tmp_path / "lr=1e-3" / "lora.safetensors")
    alike = lora(tmp_path / "x=lora.safetensors")
    assert split_name(str(there)) == ("", there) and split_name(f"x={there}") == ("x", there)
    assert split_name("lr=1e-3/lora.safetensors") == ("", there.relative_to(tmp_path))
    assert split_name(alike.name) == ("", alike.relative_to(tmp_path)) and split_name(f"y={alike.name}") == (
        "y",
        alike.relative_to(tmp_path),
    )
    assert split_name(f"lr=1e-3={there}") == ("lr=1e-3", there)
    assert split_name("runs/lr=2/none.safetensors") == ("", Path("runs/lr=2/none.safetensors"))
    assert list(checkpoints([str(there), "lr=1e-3"])) == ["lora", "lr=1e-3"]
