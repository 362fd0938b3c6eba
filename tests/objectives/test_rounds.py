"""Rounds: what is trained of them, their files, resume, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.family import Family, Towers, as4, gradient
from helpers.processes import log_of, toy_run, trained
from helpers.rounds import PROMPTS, SMALL, batch, begun, part_of

from trainer.config import ConfigError
from trainer.objectives import DDPO, RunContext
from trainer.objectives.policy_gradient.steps import log_prob
from trainer.objectives.policy_gradient.store import Rollouts
from trainer.rng import Rng
from trainer.sampling import gaussian


@pytest.mark.parametrize("window", ["each", "random", "sliding"])
def test_a_round_trains_each_of_its_steps_once_in_each_pass_and_then_is_drawn_anew(window, tmp_path):
    objective = DDPO(**SMALL, trained_count=2, window=window, window_every=1, passes=2)
    policy, rounds = Family(), []
    loss, seen = begun(objective, policy, tmp_path), []
    for number in range(12):  # two rounds of 8 images × 2 steps, twice each
        _, _, part = part_of(loss, batch(number))
        seen += [(p, i, float(x.sum())) for p, i, x in zip(part.prompts, part.index.tolist(), part.states[:, 0])]
        rounds.append(loss.round.number)
    assert rounds == [0] * 8 + [1] * 4
    first, second, third = seen[:16], seen[16:32], seen[32:]
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == 16 and not {*first} & {*third}
    assert {p for p, _, _ in first} == set(loss.objective.prompts_of(PROMPTS, 3, 0)) and len({p for p, _, _ in first + third}) == 3
    steps = {i for _, i, _ in first}
    assert steps <= {0, 1, 2, 3} and (window == "each" or len(steps) == 2)
    if window == "sliding":
        assert steps == {0, 1} and {i for _, i, _ in third} == {1, 2}
    assert len(list((tmp_path / "rollouts").iterdir())) == 2  # the old round's files are gone


def test_outside_a_window_no_noise_is_added(tmp_path):
    policy, objective = Family(), DDPO(**SMALL, trained_count=1, window="sliding")
    run, rng = RunContext(policy), Rng(0, 0, (0, 1))
    states, ends, found = objective.draw(run, ("a", "b"), rng, torch.full((2, 1), 2), 2)
    sigmas, x = policy.sigmas(5), policy.start(rng.start_noise((3, 1, 1)), 5)
    for i in range(5):
        mean, std = gaussian(x, policy.denoiser("ab")(x, sigmas[i].expand(2)), sigmas[i].expand(2), sigmas[i + 1].expand(2), float(i == 2))
        if i == 2:
            torch.testing.assert_close(states[:, 0], x)
            x = mean + as4(std, x) * rng.step_noise((3, 1, 1))(2)
            torch.testing.assert_close((states[:, 1], found[:, 0]), (x, log_prob(x, mean, std)))
        else:
            x = mean
    torch.testing.assert_close(ends, x)


def test_files_that_a_checkpoint_lists_outlive_their_round(tmp_path):
    store = Rollouts(tmp_path / "r")
    names = lambda: sorted(p.name for p in store.folder.iterdir())  # noqa: E731
    make = lambda number, first: store.write(number, first, torch.full((2, 1, 1, 1, 1), number + first / 10))  # noqa: E731
    store.replace([make(0, 0), make(0, 2)])
    store.saved()
    store.replace([make(1, 0), make(1, 2)])
    assert len(names()) == 4 and float(store.read(3, 0)) == pytest.approx(1.2)
    again = Rollouts(tmp_path / "r")
    again.restore([["000000-000000.safetensors", 0], ["000000-000002.safetensors", 2]])  # killed before the next checkpoint
    assert len(names()) == 2 and float(again.read(2, 0)) == pytest.approx(0.2)
    with pytest.raises(FileNotFoundError, match="1 files of the present round's rollouts are missing"):
        again.restore([["000001-000000.safetensors", 0]])
    store.replace([make(2, 0), make(2, 2)])
    kept = [list(file) for file in store.files]
    (store.folder / "mine.txt").write_text("a user's own")
    (store.folder / "mine").mkdir()
    store.saved()
    assert names() == ["000002-000000.safetensors", "000002-000002.safetensors", "mine", "mine.txt"]
    make(2, 2)  # the same content
    again.restore(kept)
    store.write(2, 2, torch.zeros(2, 1, 1, 1, 1))  # of another run, say
    with pytest.raises(ValueError, match="000002-000002.safetensors is not as the run wrote it: put it back, or start again"):
        again.restore(kept)


@pytest.mark.parametrize("name", ["ddpo", "g2rpo", "awm", "spo", pytest.param("pso", marks=pytest.mark.full)])
def test_a_run_resumes_to_the_same_bits(name, tmp_path):
    whole = trained(name, tmp_path / "whole")
    run = toy_run(name, tmp_path / "part")
    run.open_folder(overwrite=False, resume=False)
    for done in run.steps():
        if done.number == 5:  # the last checkpoint is of step 4, and a new round began since
            break
    assert torch.equal(trained(name, tmp_path / "part", resume=True)["weight"], whole["weight"])
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")


class Fixed(Towers):
    """The same score for every image, or the same scores for every few of them."""

    def __init__(self, score):
        self.score = score

    def __call__(self, images, prompts):
        return torch.as_tensor(self.score).expand(8)[: len(images)]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (0.25, "all 8 images of the round have the reward 0.25, and no advantage"),
        (
            torch.arange(8) * 1e-8,
            "rewards of the round have a standard deviation of 1.1e-08, and hardly an advantage: 1e-06 is added to it",
        ),
        (math.nan, "the reward of an image of '.*' is nan"),
    ],
)
def test_scores_without_an_advantage_are_refused_before_any_step(score, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        begun(DDPO(**SMALL), Family(), tmp_path, Fixed(score))(batch())


def test_a_later_round_of_equal_scores_trains_nothing_and_says_so(tmp_path, caplog):
    policy, reward = Family(), Towers()
    loss = begun(DDPO(**SMALL), policy, tmp_path, reward)
    loss(batch())
    loss.run = replace(loss.run, reward=Fixed(1.0))
    value, _ = loss(batch(8, step=4))
    assert float(gradient(policy, value).abs().max()) == 0 and "and no advantage over each other" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "group = 1: an image is compared with others"),
        ({"group": 1, "prompts_per_round": 1, "baseline": "round"}, "= 1 image: give at least 2"),
        ({"steps": 1}, "steps = 1: the last step has no noise"),
        ({"separate_rewards": True, "baseline": "history"}, "remembers one score"),
        ({"gate": 0.1}, "give a kl_weight above 0"),
        ({"trained_count": 5}, "trained_count = 5: of 5 steps 4 have noise"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPO(**{**SMALL, **settings})


def test_a_micro_batch_that_no_round_is_a_multiple_of_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 5: a round has 8 images × 3 trained steps = 24 samples, give a divisor"):
        toy_run("ddpo", tmp_path, batch_size=5)
    with pytest.raises(ValueError, match="a round takes .* GB twice"):
        DDPO(**{**SMALL, "group": 1024, "prompts_per_round": 100000, "steps": 1000}).check(RunContext(Family(), folder=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separate_rewards": True}, "give a sum of rewards, such as"),
        ({"gate": 0.1, "kl_weight": 1.0}, "auxiliary rewards, which are those of weight 0"),
        ({"diversity_weighted": True}, "give `features`"),
    ],
)
def test_options_that_this_run_has_no_reward_or_features_for_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DDPO(**SMALL, **settings).check(RunContext(Family(), Towers(), folder=tmp_path))
