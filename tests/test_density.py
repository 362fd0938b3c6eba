"""Density guidance and the length of the start noise: closed-form Gaussians, and numbers of the official code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.family import as4
from helpers.samplers import grid

from trainer.density import density_guided, rescaled_noise, with_density
from trainer.sampling import end_of, trajectory

MEAN, VARIANCE, N = 0.3, 0.49, 4096


def gaussian(x, sigma):
    """E[x0 | x, σ] for data N(MEAN, VARIANCE), variance-exploding."""
    return (VARIANCE * x + as4(sigma.square(), x) * MEAN) / (VARIANCE + as4(sigma.square(), x))


# github.com/rafalkarczewski/diffusion-density at e0e48d5: guidance.density_guidance_sampler in jax 0.10.2, 65 steps over λ from −5 to 2,
# with the score of this Gaussian and torch.randn(2, 4096) of seed 0 as noise. Mean, standard deviation and two elements of each sample.
OFFICIAL = {
    ("ve", 0.3): ([0.274061, 0.755692, -0.575173, -0.59535], [0.276293, 0.755715, 1.738173, 1.035121]),
    ("ve", 0.5): ([0.275196, 0.722644, -0.5369, -0.556194], [0.27733, 0.722661, 1.67527, 1.002969]),
    ("ve", 0.7): ([0.276384, 0.688036, -0.49682, -0.515191], [0.278416, 0.688048, 1.609398, 0.969298]),
    ("vp", 0.3): ([0.255194, 0.771577, -0.611891, -0.632492], [0.257473, 0.7716, 1.750081, 1.032251]),
    ("vp", 0.5): ([0.256249, 0.741975, -0.57757, -0.597381], [0.25844, 0.741993, 1.693776, 1.003489]),
    ("vp", 0.7): ([0.257347, 0.711161, -0.541845, -0.560833], [0.259448, 0.711174, 1.635166, 0.973551]),
}


def euler(coordinates, q):
    """Euler steps in λ = log(α²/σ²) from noise of median length, with our x0-predictions."""
    lambdas = torch.linspace(-5.0, 2.0, 65, dtype=torch.float64)
    signal = torch.sigmoid(lambdas).sqrt() if coordinates == "vp" else torch.ones(65, dtype=torch.float64)
    level = torch.sigmoid(-lambdas).sqrt() if coordinates == "vp" else (-lambdas / 2).exp()
    noise = torch.randn(2, N, generator=torch.Generator().manual_seed(0)).double().reshape(2, N, 1, 1)
    x = level[0] * rescaled_noise(noise, 0.5)
    for a, s, now, after in zip(signal, level, lambdas, lambdas[1:]):
        x_ve, sigma = x / a, (s / a).expand(2)
        clean = density_guided(x_ve, gaussian(x_ve, sigma), sigma, q)
        decay = 0.5 * torch.sigmoid(-now) if coordinates == "vp" else 0.0
        x = x + (after - now) * (decay * x - 0.5 * (x - a * clean))  # ½g²·score = −½(x − αD)
    return x.flatten(1)


@pytest.mark.parametrize(("coordinates", "q"), OFFICIAL)
def test_density_guidance_gives_the_official_codes_samples(coordinates, q):
    found = euler(coordinates, q)
    rows = torch.stack([torch.stack([x.mean(), x.std(correction=0), x[0], x[1]]) for x in found])
    torch.testing.assert_close(rows, torch.tensor(OFFICIAL[coordinates, q], dtype=torch.float64), rtol=1e-5, atol=1e-5)


def drawn(q, space="ve", steps=60):
    """DDIM from noise of median length; the final log-density of each sample under the data, by element."""
    noise = rescaled_noise(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0.5)
    sigmas = grid(steps)
    if space == "flow":
        sigmas = sigmas / (1 + sigmas)

    def denoise(x, sigma):
        scale = 1 / (1 - sigma) if space == "flow" else torch.ones_like(sigma)
        return gaussian(x * as4(scale, x), sigma * scale)

    start = noise * sigmas[0]
    x = end_of(start, trajectory(with_density(denoise, q, space), start, sigmas, lambda i: noise, "ddim", space=space))
    return x, -0.5 * ((x - MEAN).square() / VARIANCE + math.log(2 * math.pi * VARIANCE)).flatten(1).mean(1)


def test_log_density_rises_with_q_for_every_sample_and_half_changes_nothing():
    found = [drawn(q)[1] for q in (0.2, 0.35, 0.5, 0.65, 0.8)]
    assert all(bool((after > before + 1e-3).all()) for before, after in itertools.pairwise(found)), found
    assert with_density(gaussian, 0.5, "ve") is gaussian
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    clean = gaussian(x, sigma)
    assert density_guided(x, clean, sigma, 0.5) is clean


@pytest.mark.parametrize("q", [0.3, 0.7])
def test_flow_and_variance_exploding_coordinates_are_one_path(q):
    """x_flow = (1 − σ)·x_VE at σ_VE = σ / (1 − σ): DDIM of both ends in the same samples."""
    torch.testing.assert_close(drawn(q, "flow")[0], drawn(q, "ve")[0], rtol=1e-9, atol=1e-9)


def test_each_sample_has_its_own_norm_and_pure_noise_is_left_alone():
    x, sigma = torch.randn(3, 4, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0]).reshape(3, 1, 1, 1), torch.full((3,), 0.9)
    clean = gaussian(x, sigma)
    alone = torch.cat([density_guided(x[i : i + 1], clean[i : i + 1], sigma[:1], 0.3, "flow") for i in range(3)])
    assert torch.equal(density_guided(x, clean, sigma, 0.3, "flow"), alone) and not torch.equal(alone, clean)
    assert torch.equal(density_guided(x, clean, torch.ones(3), 0.3, "flow"), clean)  # nothing of the image is in it


def test_the_length_of_noise_is_set_to_a_quantile_of_its_law():
    """scipy.stats.chi.ppf of 64 degrees of freedom at 0.5 and 0.7; the direction stays."""
    noise = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert rescaled_noise(noise) is noise
    for quantile, length in ((0.5, 7.958302709971012), (0.7, 8.331624726291995)):
        found = rescaled_noise(noise, quantile)
        assert found.flatten(1).norm(dim=1).tolist() == pytest.approx([length] * 5, rel=1e-4)
        torch.testing.assert_close(torch.cosine_similarity(found.flatten(1), noise.flatten(1)), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(rescaled_noise(noise, 0.0, 1.03), 1.03 * noise)
    lengths = torch.randn(4000, 64, generator=torch.Generator().manual_seed(3)).norm(dim=1)
    assert float((lengths < 8.3316).float().mean()) == pytest.approx(0.7, abs=0.02)
