"""What a draw belongs to: a sample, a micro-batch, or in runs of 0.1.0 an optimizer step."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.family import Family, Towers
from helpers.losses import batch_of
from helpers.processes import Trained

from trainer.config import build
from trainer.data.samples import Samples
from trainer.objectives import ImageReFL, ReFL
from trainer.rng import Rng
from trainer.training import checkpoint
from trainer.training.config import TrainConfig
from trainer.training.parts import Parts
from trainer.training.run import Run

OBJECTIVES = {
    "refl": {"name": "refl", "steps": 10, "grad_from": 2, "grad_to": 9, "per_sample": False},
    "drtune": {"name": "drtune", "steps": 12, "k": 2, "early_stop": 6, "guidance_scale": 1.0},
}


def run_of(out, objective="refl", **settings):
    table = {"out": str(out), "objective": OBJECTIVES[objective], "batch_size": 2, "steps": 2, **settings}
    return Run(build(TrainConfig, table), Parts(Trained(), Samples(("a", "bb", "ccc")), Towers()))


def drawn(run, purpose="gradient step", count=24):
    """The shared draw of each micro-batch in turn."""
    micro = run.config.gradient_accumulation_steps
    return [int(run.batches(i // micro, i % micro).rng.integers(purpose, 0, 7, shared=True)[0]) for i in range(count)]


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def finished(run, **how):
    run.open_folder(**{"overwrite": False, "resume": False, **how})
    for _ in run.steps():
        pass
    return weights(run)


def test_every_micro_batch_of_an_accumulated_step_has_a_draw_of_its_own(tmp_path):
    whole, parts = drawn(run_of(tmp_path)), drawn(run_of(tmp_path, gradient_accumulation_steps=4))
    assert parts == whole  # the micro-batch's number alone decides
    assert all(len(set(parts[i : i + 4])) > 1 for i in range(0, 24, 4)) and len(set(parts)) == 8


def test_without_accumulation_draws_are_those_of_the_step():
    for step in range(50):
        assert torch.equal(
            Rng(3, step, (0, 1), step).integers("gradient step", 0, 7, shared=True),
            Rng(3, step, (0, 1)).integers("gradient step", 0, 7, shared=True),
        )
        own = [Rng(3, step, (4, 5), number).integers("gradient step", 0, 7) for number in (None, 7)]
        assert torch.equal(*own)  # draws of a sample belong to the sample


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_without_the_mark_goes_on_with_one_draw_per_step(objective, tmp_path, caplog):
    """As 0.1.0 did: the resumed run equals one whose every step shares its draw, and so does what it saves."""
    old = run_of(tmp_path / "old", objective, gradient_accumulation_steps=4)
    old.shared_draws = "step"
    assert all(len(set(drawn(old)[i : i + 4])) == 1 for i in range(0, 24, 4))
    finished(old)
    state = checkpoint.load(old.checkpoint_path)
    assert state.pop("shared_draws") == "step"
    checkpoint.save(state, old.checkpoint_path)
    with caplog.at_level(logging.WARNING):
        resumed = run_of(tmp_path / "old", objective, gradient_accumulation_steps=4, steps=4)
        found = finished(resumed, resume=True)
    assert "all micro-batches of an optimizer step share one draw" in caplog.text
    assert checkpoint.load(resumed.checkpoint_path)["shared_draws"] == "step"
    whole = run_of(tmp_path / "whole", objective, gradient_accumulation_steps=4, steps=4)
    whole.shared_draws = "step"
    assert torch.equal(found, finished(whole))
    new = finished(run_of(tmp_path / "new", objective, gradient_accumulation_steps=4, steps=4))
    assert float((new - found).abs().max()) > 1e-6


def test_a_new_run_resumes_with_its_own_draws_and_no_warning(tmp_path, caplog):
    finished(run_of(tmp_path / "cut", gradient_accumulation_steps=3))
    found = finished(run_of(tmp_path / "cut", gradient_accumulation_steps=3, steps=4), resume=True)
    assert torch.equal(found, finished(run_of(tmp_path / "whole", gradient_accumulation_steps=3, steps=4)))
    assert "earlier version" not in caplog.text


def test_turns_visit_every_integer_once_a_round_in_an_order_of_each_round():
    rng = Rng(5, 0, (0,))
    rounds = [rng.in_turn("m", 3, 9, range(7 * r, 7 * r + 7)).tolist() for r in range(200)]
    assert all(sorted(one) == list(range(3, 10)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 150
    first = torch.tensor(rounds)[:, 0].sub(3).bincount(minlength=7)
    assert bool((first - 200 / 7).abs().max() < 5 * (200 / 7 * 6 / 7) ** 0.5), first
    assert rng.in_turn("m", 3, 9, [8, 0, 8]).tolist() == [rounds[1][1], rounds[0][0], rounds[1][1]]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4])
def test_stratified_draws_visit_every_m_equally_often_in_both_kinds_of_micro_batch(share):
    """Over whole rounds of each kind, whatever their order; drawn at random, some would be met twice and others never."""
    objective = ImageReFL(steps=10, grad_from=6, grad_to=9, start_from=6, start_to=6, refl_share=share, per_sample=False, stratified=True)
    sigmas, seen = Family().sigmas(10), {True: [], False: []}
    for number in range(80):
        m = objective.gradient_step(batch_of(("a", "b"), Rng(1, number // 4, (2 * number, 2 * number + 1), number), number), sigmas)
        assert int(m[0]) == int(m[1])
        seen[objective.takes_noise(number)].append(int(m[0]))
    for found in seen.values():
        whole = found[: len(found) // 4 * 4]
        assert torch.tensor(whole, dtype=torch.long).bincount(minlength=10)[6:].tolist() == [len(whole) // 4] * 4
    assert len(seen[True]) == int(80 * share)


def test_stratified_draws_of_samples_spread_over_a_batch():
    objective, sigmas = ReFL(steps=10, grad_from=2, grad_to=9, stratified=True), Family().sigmas(10)
    for number in range(20):
        m = objective.gradient_step(
            batch_of(tuple("abcdefgh" * 2), Rng(1, number, tuple(range(16 * number, 16 * number + 16))), number), sigmas
        )
        assert m.bincount(minlength=10)[2:].tolist() == [2] * 8
