"""The reward-gradient family: its identities, in both spaces and every parametrisation, against autograd by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.family import SMALL, Family, Towers, as4, batch, gradient
from helpers.losses import batch_of, loss_of

from trainer.objectives import OBJECTIVES, SQDF, SRPO, AlignProp, DirectAlign, DRaFTK, DRaFTLV, DRTune, ReFL, RunContext
from trainer.objectives.reward_gradient.direct_align import blend_weight, from_flow
from trainer.objectives.reward_gradient.sqdf import kl_weights, transition_loss
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.sampling import alpha, step
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


# -- Direct-Align and SRPO -------------------------------------------------------------------------------------------


def four_stages(policy, x0, noise, here, there, prompts):
    """Direct-Align as the paper draws it: noise, one step with the network's own velocity, take the known noise away."""
    x = policy.add_noise(x0, noise, here)
    denoised = policy.denoiser(prompts)(x, here)
    slope = (x - denoised) / as4(here, x)  # ε̂ in VE, v in flow: dx/dσ either way
    moved = x + as4(there - here, x) * slope
    return (moved - as4(there, x) * noise) / as4(alpha(there, policy.space), x)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("gap", [-0.07, 0.07], ids=["denoise", "inversion"])
def test_direct_align_is_a_blend_with_the_prediction(prediction, gap):
    policy, b = Family(prediction), batch()
    noise = b.rng.normal("start", (3, 1, 1)).double()
    here = from_flow(torch.tensor([0.5, 0.6, 0.7, 0.85], dtype=torch.float64), policy.space)
    there = from_flow(torch.tensor([0.5, 0.6, 0.7, 0.85], dtype=torch.float64) + gap, policy.space)
    expected = four_stages(policy, b.latents, noise, here, there, b.prompts)
    denoised = policy.denoiser(b.prompts)(policy.add_noise(b.latents, noise, here), here)
    weight = blend_weight(here, there, policy.space)
    assert bool((weight > 0).all()) if gap < 0 else bool((weight < 0).all())
    found = b.latents + as4(weight, b.latents) * (denoised - b.latents)
    torch.testing.assert_close(found, expected)
    towers = Towers()
    torch.testing.assert_close(
        gradient(policy, towers(found, b.prompts).sum()), gradient(policy, towers(expected, b.prompts).sum()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_direct_align_scores_the_four_stages_at_the_levels_it_draws(branch, monkeypatch):
    policy, b = Family("flow"), batch()
    objective = DirectAlign(steps=6, source="offline", branch=branch, sigma_low=0.4, sigma_high=0.8, gap=0.25)
    share = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    monkeypatch.setattr(DirectAlign, "shares", lambda *_: share)
    loss, logs = loss_of(objective, policy, b, Towers())
    here = 0.4 + 0.4 * (share * 0.75 + (0.25 if branch == "denoise" else 0))
    there = here + (-0.1 if branch == "denoise" else 0.1)
    assert float(there.min()) >= 0.4 and float(there.max()) <= 0.8 + 1e-12
    scores = Towers()(four_stages(policy, b.latents, b.rng.normal("start", (3, 1, 1)).double(), here, there, b.prompts), b.prompts)
    torch.testing.assert_close(logs["reward"], scores.detach())
    torch.testing.assert_close(loss, (-scores if branch == "denoise" else scores).mean())


def test_a_recovery_at_zero_noise_is_refls_estimate():
    policy, b = Family("flow"), batch()
    objective = DirectAlign(steps=6, source="offline", sigma_low=0.0, sigma_high=0.8, gap=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    sigma = torch.full((4,), 0.8, dtype=torch.float64)
    noise = b.rng.normal("start", (3, 1, 1)).double()
    scores = Towers()(policy.denoiser(b.prompts)(policy.add_noise(b.latents, noise, sigma), sigma), b.prompts)
    torch.testing.assert_close(loss, -scores.mean(), rtol=1e-7, atol=1e-9)


def test_online_direct_align_starts_from_its_own_rollout_with_the_noise_that_began_it():
    policy, b = Family(), batch(latents=False)
    sigmas = policy.sigmas(6)
    noise = b.rng.normal("start", (3, 1, 1))
    x = policy.start(noise, 6)
    with torch.no_grad():
        for i in range(6):
            here, there = sigmas[i].expand(4), sigmas[i + 1].expand(4)
            x = step(x, policy.denoiser(b.prompts)(x, here), here, there, eta=0.0)
    online = loss_of(DirectAlign(steps=6, sigma_low=0.3, sigma_high=0.8), policy, b, Towers())[0]
    offline = loss_of(
        replace(DirectAlign(steps=6, sigma_low=0.3, sigma_high=0.8), source="offline"), policy, batch_of(b.prompts, b.rng, 0, x), Towers()
    )[0]
    torch.testing.assert_close(online, offline)
    torch.testing.assert_close(gradient(policy, online), gradient(policy, offline))


def test_srpo_is_the_difference_of_the_scores_under_control_words():
    policy, b = Family(), batch(number=4)
    words = {"positive": ("xx", "yyyy"), "negative": ("z", "zz", "zzz")}
    objective = SRPO(steps=6, source="offline", sigma_low=0.3, sigma_high=0.8, kappa_low=-0.5, kappa_high=0.7, **words)
    share, low, high = objective.shares(b, 0), 0.3, 0.8
    loss, logs = loss_of(objective, policy, b, Towers())
    called = from_flow(low + (high - low) * (share * 0.9 + 0.1), "ve").double()
    recovered = from_flow(low + (high - low) * (share * 0.9 + 0.1) - (high - low) * 0.1, "ve").double()
    images = four_stages(policy, b.latents, b.rng.normal("start", (3, 1, 1)).double(), called, recovered, b.prompts)
    scores = Towers().scores(images, b.prompts, ["xx. ", "zz. "])  # micro-batch 4: words 4 mod 2 and 4 mod 3
    kappa = -0.5 + 1.2 * share.double()
    torch.testing.assert_close(loss, -((1 + kappa) * scores[:, 0] - scores[:, 1]).mean(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logs["relative"], (scores[:, 0] - scores[:, 1]).detach(), rtol=1e-6, atol=1e-8)


# -- DRaFT, AlignProp, DRTune ----------------------------------------------------------------------------------------


def loop(policy, b, steps, first, eta=0.0):
    """The whole chain by hand, with a graph from `first` on."""
    sigmas = policy.sigmas(steps)
    x = policy.start(b.rng.normal("start", (3, 1, 1)), steps)
    for i in range(steps):
        here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
        denoised = policy.denoiser(b.prompts)(x, here)
        noise = b.rng.normal(f"step {i}", (3, 1, 1)).double() if eta and i + 1 < steps else None
        x = step(x, denoised, here, there, noise, eta if noise is not None else 0.0, policy.space)
        if i + 1 == first:
            x = x.detach()
    return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_draft_k_is_autograd_through_the_last_k_steps(k, recompute):
    policy, b = Family(), batch()
    loss, _ = loss_of(DRaFTK(steps=6, k=k, guidance_scale=1.0, recompute=recompute), policy, b, Towers())
    expected = -Towers()(loop(policy, b, 6, 6 - k), b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


def test_draft_lv_averages_over_renoised_ends():
    policy, b = Family("flow"), batch()
    loss, logs = loss_of(DRaFTLV(steps=6, guidance_scale=1.0, samples=2), policy, b, Towers())
    end, sigma = loop(policy, b, 6, 5), policy.sigmas(6)[5].expand(4)
    scores = [Towers()(end, b.prompts)]
    for j in range(2):
        noise = b.rng.normal(f"low variance {j}", (3, 1, 1)).double()
        scores.append(Towers()(policy.denoiser(b.prompts)(policy.add_noise(end.detach(), noise, sigma), sigma), b.prompts))
    expected = -torch.stack(scores).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    assert logs["reward"].shape == (4,)


def test_alignprop_is_an_ancestral_draft_with_a_random_cut():
    objective = AlignProp(steps=20, cut_mean=16.0, cut_std=2.0, guidance_scale=1.0)
    cuts = torch.tensor([float(objective.first(batch(number=n))) for n in range(2000)])
    assert cuts.min() >= 0 and cuts.max() <= 19
    below = [
        min(c, 19.0) for c in (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 2 + 16).round().tolist() if 0 <= c < 20
    ]
    truncated = torch.tensor(below)
    assert float(cuts.mean()) == pytest.approx(float(truncated.mean()), abs=4 * float(truncated.std()) / 2000**0.5)
    policy, b = Family(), batch()
    objective = AlignProp(steps=6, cut_mean=3.0, cut_std=0.0, guidance_scale=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    expected = -Towers()(loop(policy, b, 6, 3, eta=1.0), b.prompts).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_drtune_holds_the_networks_input(prediction):
    """By hand, with the noise prediction taken at a detached state, and without a graph where not trained."""
    policy, b = Family(prediction), batch()
    objective = DRTune(steps=6, k=2, early_stop=3, guidance_scale=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    offset = int(b.rng.integers("trained steps", 0, 2, shared=True)[0])
    last = 5 - int(b.rng.integers("early stop", 0, 2, shared=True)[0])
    trained = {offset, offset + 3} if offset <= last else {last}
    sigmas = policy.sigmas(6)
    x = policy.start(b.rng.normal("start", (3, 1, 1)), 6)
    for i in range(last + 1):
        here = sigmas[i].expand(4)
        held = x.detach()
        a, a_next = alpha(sigmas[i], policy.space), alpha(sigmas[i + 1], policy.space)
        epsilon = (held - a * policy.denoiser(b.prompts)(held, here)) / as4(here, x)
        epsilon = epsilon if i in trained else epsilon.detach()
        clean = (x - sigmas[i] * epsilon) / a
        x = clean if i == last else a_next * clean + sigmas[i + 1] * epsilon
    expected = -Towers()(x, b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


# -- SQDF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["base", "consistency"])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_sqdf_without_discount_kl_and_buffer_is_the_plain_one_step_gradient(prediction, estimator):
    """End to end autograd through a second network object: what the project avoids, and so independent of how it does."""
    policy, b = Family(prediction), batch()
    objective = SQDF(steps=6, gamma=1.0, alpha=0.0, buffer_gb=0.0, guidance_scale=1.0, estimator=estimator)
    index = torch.tensor([0, 2, 4, 5])  # the last one ends in x0 itself
    sigmas = policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    loss, logs = transition_loss(objective, RunContext(policy, Towers()), b.prompts, b.rng, x, index)
    frozen = Family(prediction)
    noise = b.rng.normal("transition noise", (3, 1, 1)).double()
    here, there = sigmas[index], sigmas[index + 1]
    following = step(x, policy.denoiser(b.prompts)(x, here), here, there, noise, 1.0, policy.space)
    estimate = torch.cat([frozen.denoiser(b.prompts[:3], adapter=estimator)(following[:3], there[:3]), following[3:]])
    expected = -Towers()(estimate, b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    torch.testing.assert_close(logs["reward"], Towers()(estimate, b.prompts).detach())


def test_the_discount_counts_the_steps_that_follow():
    policy, b = Family(), batch()
    index, sigmas = torch.tensor([0, 2, 4, 5]), policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    objective = SQDF(steps=6, gamma=0.5, alpha=0.0, guidance_scale=1.0)
    loss, logs = transition_loss(objective, RunContext(policy, Towers()), b.prompts, b.rng, x, index)
    credit = torch.tensor([0.5**5, 0.5**3, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), -(credit * logs["reward"]).mean())


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_the_closed_form_kl_is_the_mean_log_ratio_of_samples(prediction):
    policy, b = Family(prediction), batch()
    index = torch.tensor([0, 1, 3, 4])
    sigmas = policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    here, there = sigmas[index], sigmas[index + 1]
    tuned, base = policy.denoiser(b.prompts)(x, here), policy.denoiser(b.prompts, adapter="base")(x, here)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    means = [step(x, d, here, there, zero, 1.0, policy.space) for d in (tuned, base)]
    width = (step(x, tuned, here, there, one, 1.0, policy.space) - means[0]).flatten(1)[:, 0]
    laws = [torch.distributions.Normal(m.detach().flatten(1), width.detach()[:, None]) for m in means]
    torch.manual_seed(0)
    samples = laws[0].sample((200_000,))
    ratios = (laws[0].log_prob(samples) - laws[1].log_prob(samples)).sum(2)
    found = (kl_weights(sigmas, policy.space)[index] * (tuned - base).square().flatten(1).sum(1)).detach()
    assert bool((found > 1e-4).all())
    error = (ratios.mean(0) - found).abs()
    assert bool((error < 5 * ratios.std(0) / 200_000**0.5).all()), (ratios.mean(0), found)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*laws).sum(1), rtol=1e-8, atol=1e-10)


def test_the_kl_is_logged_in_nats_and_weighed_per_element_the_last_transition_included():
    policy, b, sigmas = Family(), batch(), Family().sigmas(6)
    index = torch.tensor([1, 3, 4, 5])
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    weights = kl_weights(sigmas, "ve")[index]
    assert bool((kl_weights(sigmas, "ve") > 0).all())
    denoised = policy.denoiser(b.prompts)(x, sigmas[index])
    nats = weights * (denoised - policy.denoiser(b.prompts, adapter="base")(x, sigmas[index])).square().flatten(1).sum(1)
    run = RunContext(policy, Towers())
    objectives = [SQDF(steps=6, alpha=a, guidance_scale=1.0) for a in (7.0, 0.0)]
    (with_kl, logs), (without, _) = (transition_loss(o, run, b.prompts, b.rng, x, index) for o in objectives)
    torch.testing.assert_close(logs["kl"], nats.detach())
    torch.testing.assert_close(logs["kl per element"], nats.detach() / 3)
    torch.testing.assert_close(gradient(policy, with_kl) - gradient(policy, without), gradient(policy, 7.0 * nats.mean() / 3))


# -- what every objective has ----------------------------------------------------------------------------------------


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


# -- adapter states of a real policy -----------------------------------------------------------------------------------


@pytest.fixture
def consistency_file(policy, tmp_path):
    from tools.embedded.distil import TARGETS
    from trainer.lora.file import save_lora

    policy.add_lora(Lora(rank=4, alpha=4.0, targets=TARGETS))
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    save_lora(policy, tmp_path / "consistency.safetensors", {})
    return tmp_path / "consistency.safetensors"


def loaded(pipeline_folder, consistency_file, seed=2):
    from trainer.lora.file import load_consistency
    from trainer.models.unet import UNetPolicy

    policy = UNetPolicy.load(pipeline_folder)
    if consistency_file is not None:
        load_consistency(policy, consistency_file)
    policy.add_lora(Lora(rank=4, alpha=4.0), seed)
    rng = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return policy


def test_states_are_the_models_that_separate_loads_give(pipeline_folder, consistency_file):
    from trainer.lora.file import load_lora
    from trainer.models.unet import UNetPolicy

    policy = loaded(pipeline_folder, consistency_file)
    x, sigma, prompts = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.7, 4.0]),
        ["a red star", "a ring"],
    )
    alone = UNetPolicy.load(pipeline_folder)
    with torch.no_grad():
        tuned = policy.denoiser(prompts)(x, sigma)
        torch.testing.assert_close(tuned, loaded(pipeline_folder, None).denoiser(prompts)(x, sigma))
        torch.testing.assert_close(policy.denoiser(prompts, adapter="base")(x, sigma), alone.denoiser(prompts)(x, sigma))
        load_lora(alone, consistency_file)
        estimated = policy.denoiser(prompts, adapter="consistency")(x, sigma)
        torch.testing.assert_close(estimated, alone.denoiser(prompts)(x, sigma))
        assert (estimated - tuned).abs().max() > 1e-3
        torch.testing.assert_close(policy.denoiser(prompts)(x, sigma), tuned)
    with pytest.raises(ValueError, match="no adapter 'consistency' is loaded: use one of base, tuned"):
        alone.denoiser(prompts, adapter="consistency")


def test_every_toggle_restores_what_is_trained(pipeline_folder, consistency_file):
    policy = loaded(pipeline_folder, consistency_file)
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    for state in ("base", "consistency"):
        leaf = x.clone().requires_grad_()
        policy.denoiser(["a"], adapter=state)(leaf, sigma).sum().backward()
        assert float(leaf.grad.abs().max()) > 0 and not any(p.grad is not None for p in policy.network.parameters())
        trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in policy.named_parameters()}
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        before = [p.detach().clone() for p in policy.parameters()]
        frozen = {name: p.detach().clone() for name, p in policy.network.named_parameters() if name not in trained}
        policy.denoiser(["a"])(x, sigma).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
        assert all(torch.equal(value, dict(policy.network.named_parameters())[name]) for name, value in frozen.items())


@pytest.mark.parametrize("estimator", ["base", "consistency"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_sqdf_on_a_real_network_equals_a_second_copy_of_it(pipeline_folder, consistency_file, estimator, recomputed):
    """The estimator as another object, one graph through both: the copies that adapter states save us."""
    policy = loaded(pipeline_folder, consistency_file)
    policy.gradient_checkpointing(denoiser=recomputed, vae=recomputed)
    objective = SQDF(steps=10, gamma=1.0, alpha=0.0, guidance_scale=1.0, estimator=estimator)
    b = batch_of(("a red star", "a ring"), Rng(0, 0, (0, 1)), 0)
    index, sigmas = torch.tensor([4, 8]), policy.sigmas(10)
    x = policy.add_noise(
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), b.rng.normal("start", (4, 8, 8)), sigmas[index]
    )

    class Mean:
        differentiable = True

        def __call__(self, images, prompts):
            return images.square().flatten(1).mean(1)

    transition_loss(objective, RunContext(policy, Mean()), b.prompts, b.rng, x, index)[0].backward()
    found = [p.grad.clone() for p in policy.parameters()]
    assert all(float(g.abs().max()) > 0 for g in found)
    frozen = copy.deepcopy(policy)
    policy.gradient_checkpointing(denoiser=False, vae=False)
    frozen.gradient_checkpointing(denoiser=False, vae=False)
    for parameter in policy.parameters():
        parameter.grad = None
    here, there = sigmas[index], sigmas[index + 1]
    following = step(x, policy.denoiser(b.prompts)(x, here), here, there, b.rng.normal("transition noise", (4, 8, 8)), 1.0)
    estimate = frozen.denoiser(b.prompts, adapter=estimator)(following, there)
    (-Mean()(policy.decode(estimate), b.prompts).mean()).backward()
    for a, p in zip(found, policy.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=2e-4, atol=1e-7)


def test_a_consistency_adapter_of_another_model_is_refused(pipeline_folder, consistency_file, tmp_path):
    from safetensors.torch import load_file, save_file

    from trainer.lora.file import load_consistency
    from trainer.models.unet import UNetPolicy

    renamed = {k.replace("down_blocks_0", "down_blocks_7"): v for k, v in load_file(consistency_file).items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made for another model"):
        load_consistency(UNetPolicy.load(pipeline_folder), tmp_path / "other.safetensors")


def test_refl_range_by_levels_is_unchanged():
    assert ReFL(steps=6, grad_from=0, grad_to=5, sigma_low=0.05, sigma_high=2.0).index_range(Family().sigmas(6)) == (4, 5)
