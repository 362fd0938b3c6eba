"""The replay buffer: its sampling distribution, its size, and its survival of a kill at any moment."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.family import Family, Towers, batch
from helpers.losses import batch_of
from helpers.runs import command, same_lora, settings, wait_for_steps

from trainer.__main__ import main
from trainer.objectives import SQDF, RunContext
from trainer.objectives.reward_gradient.replay import Replay, trajectory_bytes
from trainer.rng import Rng
from trainer.runtime.files import free_bytes


def filled(folder, rewards, capacity=100, steps=4):
    replay = Replay(folder, capacity)
    for i, reward in enumerate(rewards):
        replay.add(f"prompt {i}", reward, torch.full((steps, 2, 1, 1), float(i)) + torch.arange(steps).reshape(-1, 1, 1, 1) / 8)
    return replay


@pytest.mark.parametrize("sampling", ["uniform", "prioritised"])
def test_draws_follow_the_sampling_distribution(sampling, tmp_path):
    rewards, gamma, steps, n = [0.5, -1.0, 2.0, 1.0], 0.7, 4, 40_000
    replay = filled(tmp_path, rewards)
    expected = torch.zeros(4, steps, dtype=torch.float64)
    for j, reward in enumerate(rewards):  # the definition, entry by entry
        for i in range(steps):
            weight = {"uniform": 1.0, "prioritised": max(reward, 0.0) * gamma ** (steps - 1 - i)}
            expected[j, i] = weight[sampling]
    expected = expected / expected.sum()
    drawn = replay.draw(torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64), sampling, steps, gamma)
    counts = torch.zeros(4, steps, dtype=torch.float64)
    for trajectory, index in drawn:
        counts[trajectory.number, index] += 1
    assert bool((counts[expected == 0] == 0).all())
    assert bool(((counts / n - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all())


def test_newest_takes_a_state_of_each_of_the_last_trajectories(tmp_path):
    """As the official code's: N draws have N trajectories, the most recent, and over many draws every state of each."""
    replay, steps, size = filled(tmp_path, [0.0] * 7), 4, 5
    seen = torch.zeros(7, steps)
    for seed in range(400):
        uniform = torch.rand(size, generator=torch.Generator().manual_seed(seed))
        drawn = replay.newest(uniform, range(size), size, steps)
        assert [t.number for t, _ in drawn] == [2, 3, 4, 5, 6]
        parts = [replay.newest(uniform[part], rows, size, steps) for part, rows in ((slice(0, 2), (0, 1)), (slice(2, 5), (2, 3, 4)))]
        assert [*parts[0], *parts[1]] == drawn  # two processes draw what one does
        for trajectory, index in drawn:
            seen[trajectory.number, index] += 1
    assert seen[:2].sum() == 0
    assert bool((seen[2:] - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5), seen
    few = replay.newest(torch.zeros(9), range(9), 9, steps)
    assert [t.number for t, _ in few] == [5, 6, 0, 1, 2, 3, 4, 5, 6]


def test_a_run_on_the_newest_rollouts_trains_on_its_own_prompts(tmp_path):
    """Collected anew for every micro-batch, the newest N states are those of its own N rollouts."""
    objective = SQDF(steps=6, guidance_scale=1.0, buffer_gb=1e-5, replay="newest")
    loss, seen = objective.begin(RunContext(Family(), Towers(), folder=tmp_path)), []
    loss.replay.newest, plain = lambda *a: seen.append(plain(*a)) or seen[-1], loss.replay.newest
    for number in range(3):
        b = batch(number=number)
        loss(batch_of(b.prompts, Rng(3, number, tuple(range(4 * number, 4 * number + 4))), number))
    assert [[t.prompt for t, _ in drawn] for drawn in seen] == [list("abcd")] * 3
    assert [[t.number for t, _ in drawn] for drawn in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_without_a_positive_reward_prioritised_is_uniform_over_trajectories(tmp_path):
    chances = filled(tmp_path, [-1.0, -2.0]).probabilities("prioritised", 4, 1.0)
    torch.testing.assert_close(chances, torch.full((2, 4), 1 / 8, dtype=torch.float64))


def test_states_come_back_and_the_oldest_leave_with_the_next_checkpoint(tmp_path):
    replay = filled(tmp_path / "buffer", [0.0, 1.0, 2.0, 3.0], capacity=2)
    assert [t.number for t in replay.trajectories] == [2, 3] and replay.trajectories[0].prompt == "prompt 2"
    torch.testing.assert_close(replay.read(replay.trajectories[1], 2), torch.full((2, 1, 1), 3.25))
    assert len(list((tmp_path / "buffer").iterdir())) == 4  # an older checkpoint may still need them
    replay.saved()
    assert sorted(p.name for p in (tmp_path / "buffer").iterdir()) == ["000000002.safetensors", "000000003.safetensors"]


def test_a_kill_after_a_checkpoint_leads_back_to_it(tmp_path):
    replay = filled(tmp_path, [0.0, 1.0, 2.0], capacity=2)
    state = json.loads(json.dumps(replay.state()))
    replay.saved()
    for _ in range(5):  # then more come, the old ones leave the list, and the process dies before the next checkpoint
        replay.add("later", 9.0, torch.zeros(4, 2, 1, 1))
    (tmp_path / "000000009.partial").write_bytes(b"half")
    again = Replay(tmp_path, 2)
    again.restore(state)
    assert again.state() == state
    torch.testing.assert_close(again.read(again.trajectories[0], 0), torch.full((2, 1, 1), 1.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_file_is_named(tmp_path):
    replay = filled(tmp_path, [0.0, 1.0])
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 trajectories of the replay buffer are missing"):
        Replay(tmp_path, 9).restore(replay.state())


def test_sizes(tmp_path):
    filled(tmp_path, [0.0], steps=50)
    stored = next(tmp_path.iterdir()).stat().st_size
    assert trajectory_bytes(50, (2, 1, 1)) <= stored <= trajectory_bytes(50, (2, 1, 1)) + 200
    assert trajectory_bytes(50, (4, 64, 64)) == 1_638_400  # Stable Diffusion at 512²: 1.6 MB, in half precision
    assert free_bytes(tmp_path / "not" / "there") > 0


BLACK_BOX = {
    "reward": "incompressibility",
    "standardise": False,
    "objective.queries": [4, 4],
    "objective.updates_per_loop": 6,
    "objective.epochs": 3,
    "objective.heads": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("sqdf", marks=pytest.mark.full), "sqdf-black-box"])
def test_a_killed_run_resumes_to_the_same_tensors(name, pipeline_folder, reward_folder, image_folder, tmp_path):
    """Accumulation, reuse of old rollouts, and for the black box a second loop of queries after the kill."""
    more = {"images": "", "prompts": str(tmp_path / "prompts.txt"), "objective.name": name, "objective.collect_every": 3}
    more |= {"objective.guidance_scale": 1.0, "objective.buffer_gb": 3e-5, "objective.replay": "prioritised", "steps": 6}
    if name == "sqdf-black-box":
        more |= {**BLACK_BOX, "features": str(reward_folder)}
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na green cross\n")

    def arguments(folder):
        given = {"objective.grad_from", "objective.grad_to", "objective.start_from", "objective.start_to"}
        listed = settings(pipeline_folder, reward_folder, image_folder, folder, **more)
        return ["train", *(a for a in listed if a[2:].split("=")[0] not in given)]

    assert main(arguments(tmp_path / "whole")) == 0
    process = command(arguments(tmp_path / "cut"))
    wait_for_steps(tmp_path / "cut" / "log.jsonl", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    assert main([*arguments(tmp_path / "cut"), "--resume"]) == 0
    same_lora(tmp_path / "whole" / "lora.safetensors", tmp_path / "cut" / "lora.safetensors")
    buffers = [sorted((tmp_path / n / "replay").iterdir()) for n in ("whole", "cut")]
    assert [p.name for p in buffers[0]] == [p.name for p in buffers[1]] and len(buffers[0]) >= 2
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(*buffers))
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objective"] for n in ("whole", "cut")]
    assert str(states[0]) == str(states[1])
    if name == "sqdf-black-box":
        assert len(states[0]["labels"]) == 8 and torch.equal(states[0]["labels"], states[1]["labels"])
        assert all(torch.equal(v, states[1]["heads"][k]) for k, v in states[0]["heads"].items())
