"""Headless runs as a user starts them: resume after a kill, Ctrl-C, and every refusal in one line."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from helpers.runs import ROOT, command, finish, same_lora, settings, wait_for_steps

from trainer.__main__ import main
from trainer.training import checkpoint


@pytest.fixture(scope="module")
def whole(pipeline_folder, reward_folder, image_folder, tmp_path_factory):
    """The folder of a run in a process of its own that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = finish(["train", *settings(pipeline_folder, reward_folder, image_folder, folder)])
    assert code == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_tensors_and_metadata(
    how, whole, capsys, pipeline_folder, reward_folder, image_folder, tmp_path
):
    paths = (pipeline_folder, reward_folder, image_folder)
    process = command(["train", *settings(*paths, tmp_path / "cut")])
    wait_for_steps(tmp_path / "cut" / "log.jsonl", 3, process)
    process.send_signal(how)
    out, _ = process.communicate(timeout=120)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "go on with --resume" in out
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    assert main(["train", *settings(*paths, tmp_path / "cut"), "--resume"]) == 0 and "every key read back" in capsys.readouterr().out
    assert stat.S_IMODE((tmp_path / "cut" / "lora.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "cut" / "config.json").stat().st_mode
    )
    same_lora(whole / "lora.safetensors", tmp_path / "cut" / "lora.safetensors")
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, tmp_path / "cut")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


@pytest.fixture(scope="module")
def broken(tmp_path_factory, image_folder):
    """Folders that hold one mistake each."""
    folder = tmp_path_factory.mktemp("broken")
    picture = (image_folder / "0.png").read_bytes()
    for name, files in {
        "no_caption": {"a.png": picture},
        "corrupt": {"a.png": picture[:200], "a.txt": b"a star"},
        "empty": {},
        "latin": {"a.png": picture, "a.txt": b"caf\xe9"},
    }.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
    (folder / "prompts.txt").write_text("\n\n")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "x").write_text("mine")
    (folder / "file").write_text("")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrr": 1}, "unknown key 'lrr'; did you mean learning_rate"),
        ({"objective.stepz": 1}, "unknown key 'objective.stepz'"),
        ({"reward": "hpsv9"}, "unknown reward 'hpsv9': use demo-proxy"),
        ({"reward": "demo-gold"}, "has no gradient"),
        ({"steps": "many"}, "steps = 'many': expected int, got str"),
        ({"batch_size": 0}, "batch_size = 0: give at least 1"),
        ({"images": "{broken}/no_caption"}, "a.png has no caption: write one into a.txt"),
        ({"images": "{broken}/corrupt"}, "a.png is not a readable image"),
        ({"images": "{broken}/empty"}, "holds no image"),
        ({"images": "{broken}/latin"}, "is not UTF-8"),
        ({"images": "", "prompts": "{broken}/prompts.txt", "objective.refl_share": 1.0}, "is empty: give one prompt per line"),
        ({"out": "{broken}/occupied"}, "exists: add --overwrite"),
        ({"out": "{broken}/file/below"}, "cannot write to"),
        ({"model": "{broken}"}, "is not a diffusers pipeline"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(
    change, message, broken, pipeline_folder, reward_folder, image_folder, tmp_path, capsys
):
    change = {k: v.replace("{broken}", str(broken)) if isinstance(v, str) else v for k, v in change.items()}
    code = main(["train", *settings(pipeline_folder, reward_folder, image_folder, tmp_path / "out", **change)])
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and "\n" not in error and message in error, error
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in (broken / "occupied").iterdir()) == ["x"]


@pytest.mark.slow
def test_resume_refuses_other_settings(pipeline_folder, reward_folder, image_folder, tmp_path, capsys):
    paths = (pipeline_folder, reward_folder, image_folder)
    assert main(["train", *settings(*paths, tmp_path / "run", steps=2)]) == 0
    assert main(["train", *settings(*paths, tmp_path / "run", steps=3, learning_rate=0.5), "--resume"]) == 2
    assert "was written with another learning_rate: 0.001, now 0.5" in capsys.readouterr().err
    path = tmp_path / "run" / "checkpoint.pt"
    base = checkpoint.load(path)["base"]
    checkpoint.save({**checkpoint.load(path), "base": "other"}, path)
    assert main(["train", *settings(*paths, tmp_path / "run", steps=3), "--resume"]) == 2
    assert "was written over other weights than those of" in capsys.readouterr().err
    images = tmp_path / "images"
    shutil.copytree(paths[2], images)
    moved = settings(*paths[:2], images, tmp_path / "run", steps=3)
    (images / "0.txt").write_text("something else")
    checkpoint.save({**checkpoint.load(path), "base": base}, path)
    assert main(["train", *moved, "--resume"]) == 2
    assert f"images = {images}: other captions" in capsys.readouterr().err
    shutil.copy(paths[2] / "0.txt", images)
    assert main(["train", *moved, "--resume"]) == 0 and checkpoint.load(path)["step"] == 3
    path.write_bytes(b"garbage")
    assert main(["train", *settings(*paths, tmp_path / "run"), "--resume"]) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err
    assert main(["train", *settings(*paths, tmp_path / "new"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_a_non_finite_step_keeps_the_last_checkpoint(pipeline_folder, reward_folder, image_folder, tmp_path, capsys):
    paths = (pipeline_folder, reward_folder, image_folder)
    assert main(["train", *settings(*paths, tmp_path / "run", steps=2)]) == 0
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert main(["train", *settings(*paths, tmp_path / "bad", learning_rate=1e30, max_grad_norm=0.0, save_every=1)]) == 2
    assert "is not finite" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "lora.safetensors").exists()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(pipeline_folder, reward_folder, image_folder, tmp_path, capsys):
    given = settings(pipeline_folder, reward_folder, image_folder, tmp_path / "out", steps=10_000)
    process = command(["train", *given])
    try:
        wait_for_steps(tmp_path / "out" / "log.jsonl", 3, process)
        for how in ("--overwrite", "--resume"):
            assert main(["train", *given, how]) == 2 and "another run is writing to" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    given = settings(pipeline_folder, reward_folder, image_folder, tmp_path / "out", steps=1)
    assert main(["train", *given, "--overwrite"]) == 0  # a killed run blocks nothing


@pytest.mark.skipif(sys.platform == "win32", reason="files of limited size are POSIX's")
@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_file(room, tmp_path):
    """Whatever byte the disk is full at: torch's archive fails in another way at each."""
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
from trainer.lora import file as lora_file
from trainer.runtime.files import write_text
from trainer.training import checkpoint
path = Path(sys.argv[1])
writes = [
    lambda: checkpoint.save({{"x": torch.zeros(100_000)}}, path),
    lambda: write_text("a" * 30_000, path.with_name("log.jsonl")),
    lambda: lora_file.write_tensors({{"x": torch.zeros(100_000)}}, path.with_name("lora.safetensors"), {{}}, lambda _: None),
]
checkpoint.save({{"x": torch.ones(3)}}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
for write in writes:
    try:
        write()
        sys.exit(1)
    except OSError as error:
        print(error)
"""
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3 and all("cannot write" in line for line in said) and "the previous checkpoint is intact" in said[0], said
    assert checkpoint.load(path)["x"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
