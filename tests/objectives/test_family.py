"""What the reward-gradient objectives have in common, in both spaces and every parametrisation."""

from __future__ import annotations

import pytest
import torch
from helpers.family import SMALL, Family, Towers, batch, gradient
from helpers.losses import loss_of

from trainer.objectives import OBJECTIVES, SQDF, RunContext
from trainer.training.nfe import CountingPolicy


def loss_at(name, policy, tmp_path, number=0, **more):
    return loss_of(OBJECTIVES[name](**{**SMALL[name], **more}), policy, batch(number=number), Towers(), folder=tmp_path)


@pytest.mark.parametrize("name", list(SMALL))
def test_one_denoiser_gives_one_gradient_however_its_network_predicts(name, tmp_path):
    """ε and v share the space, flow has its own: states correspond by x_flow = (1 − σ_flow)·x_VE, and everything else follows."""
    values, gradients = [], []
    for prediction in ("epsilon", "v", "flow"):
        policy = Family(prediction)
        loss, _ = loss_at(name, policy, tmp_path)
        values.append(loss.detach())
        gradients.append(gradient(policy, loss))
    assert gradients[0].abs().max() > 1e-4
    for value, found in zip(values[1:], gradients[1:]):
        torch.testing.assert_close(value, values[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found, gradients[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(SMALL))
def test_the_gradient_is_the_slope_of_the_loss_where_the_state_does_not_move_with_the_adapter(name, tmp_path):
    """Offline, at a frozen state, the gradient must equal finite differences; where x depends on θ it is cut on purpose."""
    if name not in ("imagerefl", "direct-align", "srpo"):
        pytest.skip("its states come from the model itself")
    more = {"source": "offline"} if name != "imagerefl" else {"grad_from": 3, "grad_to": 3, "start_from": 3, "start_to": 3}
    policy = Family()
    found = gradient(policy, loss_at(name, policy, tmp_path, **more)[0])
    for i in range(4):
        ends = []
        for sign in (1, -1):
            other = Family()
            with torch.no_grad():
                other.weight[i] += sign * 1e-6
            ends.append(float(loss_at(name, other, tmp_path, **more)[0].detach()))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(found[i]), rel=1e-5, abs=1e-7)


def cost(name, tmp_path):
    policy = Family()
    counted = CountingPolicy(policy)
    objective = OBJECTIVES[name](**SMALL[name])
    loss, _ = loss_of(objective, counted, batch(), Towers(), folder=tmp_path)
    forwards = counted.calls
    loss.backward()
    return forwards, counted.calls - forwards


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [
        ("draft-k", 4 * 6, 4 * (3 + 2 * 3)),  # K steps recomputed, then a backward each
        ("draft-lv", 4 * (6 + 2), 4 * (3 + 2 * 3)),
        ("direct-align", 4 * (6 + 4), 4 * 8),  # two levels, two branches
        ("srpo", 4 * (6 + 2), 4 * 4),
        # rollout, tuned, estimate, reference; the estimate's own backward happens inside
        ("sqdf", 4 * (6 + 1 + 1 + 1 + 2), 4 * 2),
    ],
)
def test_calls_are_counted_as_they_happen(name, forwards, backwards, tmp_path):
    assert cost(name, tmp_path) == (forwards, backwards)


@pytest.mark.parametrize("name", list(SMALL))
def test_the_recommended_switch_is_a_level_of_the_grid_or_its_start(name):
    for prediction in ("epsilon", "flow"):
        sigmas = Family(prediction).sigmas(6)
        level = OBJECTIVES[name](**SMALL[name]).recommended_sigma(sigmas)
        assert 0 < level <= float(sigmas[0])


class Blind:
    differentiable = False

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("draft-k", {"steps": 5, "k": 6}, "K = 6 steps of a rollout that has 5"),
        ("drtune", {"steps": 5, "k": 6}, "K = 6 trained steps"),
        ("drtune", {"steps": 5, "k": 2, "early_stop": 6}, "early_stop = 6"),
        ("alignprop", {"steps": 5, "cut_mean": 5.0}, "outside the steps 0–4"),
        ("direct-align", {"gap": 0.0}, "σ' = σ"),
        ("direct-align", {"sigma_low": 0.9, "sigma_high": 0.8}, "not below"),
        ("srpo", {"positive": ()}, "at least one positive"),
        ("sqdf", {"gamma": 0.0}, r"\(0, 1\]"),
        ("sqdf", {"buffer_gb": 0.0, "collect_every": 2}, "needs a replay buffer"),
        ("sqdf-black-box", {"queries": (1,)}, "at least 2"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**settings)


@pytest.mark.parametrize(
    ("name", "settings", "reward", "message"),
    [
        ("direct-align", {"sigma_low": 0.95, "sigma_high": 0.99}, Towers(), "highest noise level, 0.900"),
        ("srpo", {}, Blind(), "two-tower"),
        ("sqdf", {"buffer_gb": 1e-9}, Towers(), "holds none"),
        ("sqdf", {"buffer_gb": 1e9}, Towers(), "GB free"),
        ("sqdf-black-box", {}, Blind(), "features"),
    ],
)
def test_settings_that_this_model_reward_or_disk_cannot_serve_are_refused(name, settings, reward, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**settings).check(RunContext(Family(), reward, folder=tmp_path / "not yet there"))


def test_an_estimator_that_is_not_loaded_is_refused(toy_policy, tmp_path):
    with pytest.raises(ValueError, match="consistency adapter"):
        SQDF(estimator="consistency").check(RunContext(toy_policy, Towers(), folder=tmp_path))
