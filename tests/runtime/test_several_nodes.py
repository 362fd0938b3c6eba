"""Two launchers, one process each, meet over TCP as on two machines: their gradients are one process's."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.processes import free_port
from helpers.runs import command, settings

from trainer.__main__ import main
from trainer.training import checkpoint


def gradients(run):
    """The gradients of a run of one step, from AdamW's first moments: (1 − 0.9) times them."""
    state = checkpoint.load(run / "checkpoint.pt")["optimizer"]["state"]
    return torch.cat([state[key]["exp_avg"].flatten() for key in sorted(state)]) * 10


@pytest.mark.full
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_two_nodes_have_the_gradients_of_one_process(rendezvous, pipeline_folder, reward_folder, image_folder, tmp_path):
    one = {"steps": 1, "batch_size": 4, "max_grad_norm": 0, "ema": 0, "objective.steps": 6}
    paths, port = (pipeline_folder, reward_folder, image_folder), free_port()
    common = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    if rendezvous == "c10d":
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", "--rdzv-conf=is_host=%d"]
    else:
        where = ["--master-addr=127.0.0.1", f"--master-port={port}", "--node-rank=%d"]
    arguments = ["train", *settings(*paths, tmp_path / "two", **one)]
    nodes = [command(arguments, [*common, *where[:-1], where[-1] % (1 - n if rendezvous == "c10d" else n)]) for n in range(2)]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("every key read back" in out for out, _ in said) == 1  # one of them writes
    assert main(["train", *settings(*paths, tmp_path / "one", **one)]) == 0
    ours, alone = gradients(tmp_path / "two"), gradients(tmp_path / "one")
    error = float((ours - alone).norm() / alone.norm())
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("two", "one")]
    print(f"relative difference {error:.1e}, gradient norms {logs[0]['grad_norm']:.6f} and {logs[1]['grad_norm']:.6f}")
    assert float(alone.norm()) > 0 and error <= 1e-4
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)
