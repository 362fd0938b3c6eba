"""Several processes train as one: the same gradients, files and questions; and one that fails stops all."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import psutil  # accelerate needs it
import pytest
import torch
from helpers.processes import (
    CASES,
    SHARDED,
    every_case,
    every_sharded_case,
    finish,
    free_port,
    log_of,
    said,
    sharded_run,
    start,
    toy_command,
    toy_run,
    trained,
)
from helpers.runs import command, settings, wait_for_steps
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.lora.file import read_lora
from trainer.runtime.processes import ALONE, Joined, joined
from trainer.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests' processes are forked")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found for all cases."""
    folder = tmp_path_factory.mktemp("two")
    assert finish(start(2, every_case, folder)) == [0, 0], [said(folder, r) for r in range(2)]
    return folder, [torch.load(folder / f"results.{rank}.pt") for rank in range(2)]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_are_one_with_the_joined_batch(case, two, tmp_path):
    folder, results = two
    alone = trained(case, tmp_path / "alone")
    for found in (results[0][case], results[1][case]):
        assert relative(found["gradient"], alone["gradient"]) <= 1e-5
        assert relative(found["weight"], alone["weight"]) <= 1e-4
        assert found["asked"] == alone["asked"]
    assert torch.equal(results[0][case]["weight"], results[1][case]["weight"])
    for here, there in zip(log_of(folder / case), log_of(tmp_path / "alone"), strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-6)
    buffers = [sorted(p.name for p in out.glob("replay/*")) for out in (folder / case, tmp_path / "alone")]
    assert buffers[0] == buffers[1] and bool(buffers[0]) == ("buffer_gb" in CASES[case] and CASES[case]["buffer_gb"] > 0)
    saved = [load_file(out / "lora.safetensors") for out in (folder / case, tmp_path / "alone")]
    for key, value in saved[1].items():
        torch.testing.assert_close(saved[0][key], value)


def test_halves_of_the_gradient_differ(tmp_path):
    """Were nothing averaged, the test above would fail: the two halves of a batch do not have one gradient."""
    run = toy_run("refl", tmp_path)
    halves = []
    for rank in range(2):
        run.processes = Joined(rank, 2, rank)
        loss, _ = run.loss(run.batches(0, 0))
        halves.append(torch.autograd.grad(loss, run.policy.weight)[0])
    assert relative(*halves) > 1e-2


@pytest.mark.parametrize(("trouble", "message"), [("nan", "is not finite"), ("disk", "No space left on device")])
def test_an_error_of_one_process_stops_all_and_is_said_once(trouble, message, tmp_path):
    codes = finish(start(2, toy_command, tmp_path, str(tmp_path / "run"), "sqdf by priority", trouble, 1, 7))
    words = [said(tmp_path, rank) for rank in range(2)]
    assert codes == [2, 2] and words[0] == [], words
    assert len(words[1]) == 1 and words[1][0].startswith("error: ") and message in words[1][0]
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_an_error_that_all_have_is_said_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text("mine")
    assert finish(start(2, toy_command, tmp_path, str(tmp_path / "run"), "refl", "none", 0, 0)) == [2, 2]
    assert "exists: add --overwrite" in said(tmp_path, 0)[0] and said(tmp_path, 1) == []
    assert finish(start(2, toy_command, tmp_path, str(tmp_path / "new"), "refl", "none", 0, 0, True)) == [2, 2]
    assert "nothing to resume" in said(tmp_path, 0)[0] and said(tmp_path, 1) == []


@pytest.mark.parametrize(("trouble", "rank"), [("kill", 0), ("kill", 1), ("hang", 1)])
def test_a_lost_process_stops_the_rest_and_any_number_goes_on_from_the_checkpoint(trouble, rank, tmp_path):
    case, out = "sqdf by priority", tmp_path / "run"
    processes = start(2, toy_command, tmp_path, str(out), case, trouble, rank, 7)
    processes[1 - rank].join(30)
    processes[rank].kill()  # one that hangs, hangs
    assert finish(processes)[1 - rank] == 2
    (line,) = said(tmp_path, 1 - rank)
    assert line.startswith("error: process") and "another one was killed, crashed or hangs" in line and "--resume" in line
    step = checkpoint.load(out / "checkpoint.pt")["step"]
    assert 0 < step < 10
    whole = trained(case, tmp_path / "whole")
    if trouble == "kill" and rank == 1:  # the same number of processes
        assert finish(start(2, toy_command, tmp_path, str(out), case, "none", 0, 0, True)) == [0, 0], [said(tmp_path, r) for r in range(2)]
    else:
        trained(case, out, resume=True)
    torch.testing.assert_close(checkpoint.load(out / "checkpoint.pt")["adapter"]["net.to_q.lora_A.default.weight"], whole["weight"])
    for here, there in zip(log_of(out), log_of(tmp_path / "whole"), strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-6)


@pytest.mark.full
def test_a_launched_run_that_loses_a_process_goes_on_alone_to_the_same_lora(
    pipeline_folder, reward_folder, heldout_folder, image_folder, tmp_path
):
    """As users start it, with watching; the end is that of a run which was alone from the start."""
    watched = {"watch.every": 2, "watch.heldout": str(heldout_folder), "watch.count": 1, "watch.images": 2, "watch.steps": 3, "steps": 8}
    paths = (pipeline_folder, reward_folder, image_folder)
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}")
    process = command(["train", *settings(*paths, tmp_path / "two", **watched)], launcher)
    wait_for_steps(tmp_path / "two" / "log.jsonl", 3, process)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "go on with --resume" in err and "Signal 9 (SIGKILL)" in err
    assert not psutil.pid_exists(ranks["0"].pid)
    assert not (tmp_path / "two" / "lora.safetensors").exists()
    assert main(["train", *settings(*paths, tmp_path / "two", **watched), "--resume"]) == 0
    assert main(["train", *settings(*paths, tmp_path / "one", **watched)]) == 0
    (found, metadata, _), (expected, whole, _) = (read_lora(tmp_path / n / "lora.safetensors") for n in ("two", "one"))
    assert found.keys() == expected.keys() and metadata == whole
    assert all(relative(found[key], value) <= 1e-3 for key, value in expected.items() if not key.endswith("alpha"))
    points = [json.loads((tmp_path / n / "watch.json").read_text()) for n in ("two", "one")]
    assert [p["step"] for p in points[0]] == [0, 2, 4, 6, 8]
    for here, there in zip(*points, strict=True):
        assert here == pytest.approx(there, abs=1e-4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, pipeline_folder):
    """What each of two processes found that share the frozen weights."""
    folder = tmp_path_factory.mktemp("shared")
    assert finish(start(2, every_sharded_case, folder, pipeline_folder), 120) == [0, 0], [said(folder, r) for r in range(2)]
    return folder, [torch.load(folder / f"results.{rank}.pt") for rank in range(2)]


def test_sharded_weights_take_half_the_memory_and_give_the_same_gradients(shared):
    for found in shared[1]:
        whole, part = found.pop("held")
        assert part <= 0.51 * whole
        assert found.keys() == SHARDED.keys()
        for name, (expected, gradient) in found.items():
            assert float(expected.norm()) > 0 and relative(gradient, expected) <= 1e-5, name


def test_a_run_on_sharded_weights_gives_the_same_lora_and_points(shared):
    whole, parts = (load_file(shared[0] / name / "lora.safetensors") for name in ("whole", "parts"))
    assert all(relative(parts[key], value) <= 1e-5 for key, value in whole.items()) and parts.keys() == whole.keys()
    points = [json.loads((shared[0] / name / "watch.json").read_text()) for name in ("whole", "parts")]
    assert [p["step"] for p in points[1]] == [0, 2]
    for here, there in zip(*points, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize(("trouble", "message"), [("disk", "No space left on device"), ("kill", "")])
def test_trouble_while_weights_are_shared_stops_all_and_one_process_goes_on_alone(trouble, message, pipeline_folder, tmp_path):
    """The other process is waiting for a part of a weight by then."""
    out = tmp_path / "run"
    codes = finish(start(2, toy_command, tmp_path, str(out), "", trouble, 1, 3, False, pipeline_folder))
    words = [said(tmp_path, rank) for rank in range(2)]
    assert codes == [2, 2] if trouble == "disk" else codes[0] == 2, words
    assert len(words[0]) == 1 and words[0][0].startswith("error: process 0 of 2: another one was killed, crashed or hangs"), words
    assert words[1] == ([f"error: {message}"] if trouble == "disk" else []), words
    assert checkpoint.load(out / "checkpoint.pt")["step"] == 1
    run = sharded_run(pipeline_folder, out, ALONE)
    run.open_folder(overwrite=False, resume=True)
    assert [done.number for done in run.steps()] == [2] and (out / "lora.safetensors").is_file()


def refused(folder, environment):
    os.environ.update(environment)
    return main(["train"])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported: launch with --multi_gpu, or with --use_fsdp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP's offloading is not supported"),
    ],
)
def test_other_strategies_are_refused(environment, message, tmp_path):
    assert finish(start(2, refused, tmp_path, environment)) == [2, 2]
    assert message in said(tmp_path, 0)[0] and said(tmp_path, 1) == []


def test_objectives_refuse_what_would_leave_sharded_processes_waiting(pipeline_folder, tmp_path):
    four = Joined(0, 4, 0, sharded=True)
    with pytest.raises(ConfigError, match=r"per_sample = true .* give per_sample = false"):
        toy_run("refl", tmp_path, four)
    with pytest.raises(ConfigError, match=r"queries = \(5, 6\): with sharded weights \(FSDP\) give multiples of 4"):
        toy_run("sqdf-black-box", tmp_path, four)
    for key, value in {"tune": "full", "compile": True, "channels_last": True}.items():
        with pytest.raises(ConfigError, match=rf"{key} = {value}: sharded weights"):
            sharded_run(pipeline_folder, tmp_path, four, batch_size=4, **{key: value})


def test_a_plain_start_sets_nothing_up(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes is ALONE and processes.main and processes.exchange(3) == [3] and processes.device("cpu") == "cpu"
    assert not torch.distributed.is_initialized()


def test_a_tracker_is_told_what_the_log_is(tmp_path, monkeypatch):
    wandb, told = ModuleType("wandb"), []
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda project: SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append(project))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trained("refl", tmp_path / "run", tracker="wandb")
    lines = log_of(tmp_path / "run")
    told = [t if isinstance(t, str) else (t[0], {k: v for k, v in t[1].items() if k != "memory_gb"}) for t in told]
    assert told == [*((line.pop("step"), line) for line in lines), "imagerefl"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        toy_run("refl", tmp_path, tracker="wandb")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 4: 3 processes share a micro-batch"):
        toy_run("refl", tmp_path, Joined(0, 3, 0))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    for kind in ("cuda", "mps", "xpu"):
        available = f"torch.{'backends.mps' if kind == 'mps' else kind}.is_available"
        monkeypatch.setattr(available, lambda: False)
        with pytest.raises(ValueError, match=f"device = {kind}: this machine, or this build of PyTorch, has none"):
            ALONE.device(kind)
        monkeypatch.setattr(available, lambda: True)
        assert ALONE.device(kind) == kind
    for name in ("gpu", "cuda:x", "cuda:"):
        with pytest.raises(ValueError, match=f"device = {name}: use cpu, cuda, mps or xpu"):
            ALONE.device(name)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ALONE.device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device = cuda:2: this machine has 2 of them; use cuda:1 or lower"):
        ALONE.device("cuda:2")


def test_pytorch_2_1_knows_no_xpu_and_has_no_mps_module_to_ask(monkeypatch):
    monkeypatch.delattr("torch.xpu")
    monkeypatch.delattr("torch.mps.is_available")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert ALONE.device("mps") == "mps"
    with pytest.raises(ValueError, match="device = xpu: this machine, or this build of PyTorch, has none"):
        ALONE.device("xpu")
    with pytest.raises(ValueError, match="process 1 of this machine has no xpu device: 0 found"):
        Joined(1, 2, 1).device("xpu")


def test_more_processes_than_devices_are_refused():
    with pytest.raises(ValueError, match="has no cuda device"):
        Joined(999, 1000, 999).device("cuda")
    assert Joined(1, 2, 1).device("cpu") == "cpu"
