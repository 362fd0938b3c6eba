"""The step formula against diffusers' schedulers, switches, and the identities of combined generation."""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from helpers.samplers import BETAS, grid, noises, table, toy_denoiser, toy_epsilon

from trainer.sampling import add_noise, end_of, leading_timesteps, step, trailing_timesteps, trajectory

OFFICIAL = {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}


@pytest.mark.parametrize("steps", [1, 4, 7, 30, 40, 1000])
def test_trailing_timesteps_are_diffusers(steps):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == trailing_timesteps(steps)


@pytest.mark.parametrize("steps", [5, 20, 40])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_equals_diffusers_ddim(steps, eta):
    scheduler = DDIMScheduler(**BETAS, **OFFICIAL, set_alpha_to_one=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == leading_timesteps(steps)
    rng = torch.Generator().manual_seed(1)
    x_vp = torch.randn(2, 4, 3, 3, generator=rng, dtype=torch.float64)
    sigmas = grid(steps)
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(x_vp.shape, generator=rng, dtype=torch.float64)
        here, there = sigmas[i].expand(2), sigmas[i + 1].expand(2)
        x = x_vp * (1 + here[0].square()).sqrt()
        ours = step(x, toy_denoiser(x, here), here, there, noise, eta) / (1 + there[0].square()).sqrt()
        x_vp = scheduler.step(toy_epsilon(x_vp, t), t, x_vp, eta=eta, variance_noise=noise).prev_sample
        assert (ours - x_vp).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [10, 40])
def test_ancestral_step_equals_diffusers_ddpm(steps):
    scheduler = DDPMScheduler(**BETAS, **OFFICIAL, variance_type="fixed_small")
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    sigmas = grid(steps)
    x_vp = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        here, there = sigmas[i].expand(2), sigmas[i + 1].expand(2)
        x = x_vp * (1 + here[0].square()).sqrt()
        drawn = torch.randn(x_vp.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        noise = drawn if i + 1 < steps else None
        ours = step(x, toy_denoiser(x, here), here, there, noise, 0.0 if noise is None else 1.0) / (1 + there[0].square()).sqrt()
        x_vp = scheduler.step(toy_epsilon(x_vp, t), t, x_vp, generator=torch.Generator().manual_seed(i)).prev_sample
        assert (ours - x_vp).abs().max() < 1e-9


def test_multistep_sampler_equals_diffusers_dpm_solver():
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(12)
    sigmas = torch.cat([table()[scheduler.timesteps], torch.zeros(1)])
    x_vp = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = trajectory(toy_denoiser, x_vp * (1 + sigmas[0].square()).sqrt(), sigmas, noises(0), "dpmpp_2m")
    for i, (t, transition) in enumerate(zip(scheduler.timesteps[:-1], ours)):  # the last step differs by diffusers' own end point
        x_vp = scheduler.step(toy_epsilon(x_vp, t), t, x_vp).prev_sample
        assert (transition.x_next / (1 + sigmas[i + 1].square()).sqrt() - x_vp).abs().max() < 1e-5


def test_flow_euler_is_a_straight_line():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    high, low = torch.tensor([0.9, 0.8]), torch.tensor([0.5, 0.1])
    x = add_noise(x0, noise, high, "flow")
    torch.testing.assert_close(step(x, x0, high, low, eta=0.0, space="flow"), add_noise(x0, noise, low, "flow"))


def test_a_gaussian_stays_the_gaussian_it_should_be():
    """With data N(0, s²) the exact denoiser is linear, and ancestral sampling must end with that standard deviation."""
    s, n = 0.5, 40_000
    sigmas = grid(500)
    rng = torch.Generator().manual_seed(4)

    def denoiser(x, sigma):
        return x * (s**2 / (s**2 + sigma.square())).reshape(-1, 1, 1, 1)

    x = torch.randn(n, 1, 1, 1, generator=rng, dtype=torch.float64) * (s**2 + sigmas[0].square()).sqrt()
    end = end_of(x, trajectory(denoiser, x, sigmas, lambda i: torch.randn(n, 1, 1, 1, generator=rng, dtype=torch.float64)))
    assert math.isclose(end.std().item(), s, rel_tol=0.03)


def test_step_to_zero_returns_the_prediction():
    x, denoised = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(step(x, denoised, torch.tensor([0.3]), torch.tensor([0.0]), eta=0.0), denoised)


@dataclass(frozen=True)
class Rows:
    """A denoiser that moves each sample to its own target, and counts its evaluations."""

    targets: torch.Tensor
    counts: torch.Tensor
    numbers: torch.Tensor

    def __call__(self, x, sigma):
        assert len(x) == len(sigma) == len(self.targets)
        self.counts[self.numbers] += 1
        return toy_denoiser(x, sigma) + self.targets.reshape(-1, 1, 1, 1)

    def rows(self, index):
        return Rows(self.targets[index], self.counts, self.numbers[index])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_with_ranges_of_their_own_end_where_each_alone_ends(eta):
    sigmas, first, last = grid(10), torch.tensor([0, 3, 4, 6]), torch.tensor([2, 7, 4, 10])
    x = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    targets = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def noise_at(i):
        return torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    counts = torch.zeros(4, dtype=torch.long)
    transitions = list(trajectory(Rows(targets, counts, torch.arange(4)), x, sigmas, noise_at, first=first, last=last, eta=eta))
    assert counts.tolist() == [2, 4, 0, 4] and [t.i for t in transitions] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    for row in range(4):
        alone = Rows(targets[[row]], torch.zeros(1), torch.tensor([0]))
        steps = trajectory(alone, x[[row]], sigmas, lambda i, r=row: noise_at(i)[[r]], first=int(first[row]), last=int(last[row]), eta=eta)
        assert torch.equal(end_of(x[[row]], steps)[0], end_of(x, transitions)[row])
    assert torch.equal(transitions[0].x_next[2], x[2]) and float(transitions[0].std[2]) == 0
    with pytest.raises(TypeError, match="rows"):
        next(trajectory(toy_denoiser, x, sigmas, noise_at, first=first, last=last))
    with pytest.raises(ValueError, match="one range"):
        next(trajectory(Rows(targets, counts, torch.arange(4)), x, sigmas, noise_at, "dpmpp_2m", first, last))


def test_a_transition_is_a_draw_of_its_gaussian():
    """x_next is the mean plus the standard deviation times the noise, and the log density of a step follows."""
    sigmas, n = grid(6), 4000
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64).expand(n, -1, -1, -1)
    drawn = torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for t in trajectory(toy_denoiser, x, sigmas, lambda i: drawn, last=1):
        torch.testing.assert_close(t.x_next, t.mean + t.std.reshape(-1, 1, 1, 1) * drawn)
        assert float((t.x_next.std(0) / t.std[0]).sub(1).abs().max()) < 0.06 and float(t.std[0]) > 0.1
    for method in ("ddim", "dpmpp_2m"):
        assert all(float(t.std.max()) == 0 and torch.equal(t.mean, t.x_next) for t in trajectory(toy_denoiser, x[:1], sigmas, None, method))


def test_an_empty_range_leaves_the_state_untouched():
    x = torch.randn(1, 4, 2, 2)
    assert end_of(x, trajectory(toy_denoiser, x, grid(10), noises(0), first=7, last=7)) is x
