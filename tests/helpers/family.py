"""One nonlinear policy in every parametrisation, a smooth reward with prefixes, and small settings of each objective."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from helpers.losses import batch_of
from helpers.toys import ToyDenoiser

from trainer.rng import Rng
from trainer.sampling import add_noise

STATES = {"base": torch.zeros(4, dtype=torch.float64), "consistency": torch.tensor([0.05, 0.1, -0.2, 0.3], dtype=torch.float64)}


def as4(value, like):
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Family:
    """One nonlinear D_θ, asked as an ε-, a v- or a flow-predicting network would be, in the space that goes with it.

    The network speaks in its own prediction; the policy turns that back into x0. Latents are their own pixels.
    """

    latent_shape = (3, 1, 1)
    adapters = frozenset({"tuned", *STATES})
    device = torch.device("cpu")

    def __init__(self, prediction="epsilon"):
        self.prediction, self.space = prediction, "flow" if prediction == "flow" else "ve"
        self.weight = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.4, 0.1], dtype=torch.float64))
        self.calls = 0

    @staticmethod
    def ideal(x, sigma, w):
        """D(x_VE, σ_VE)."""
        c = 1 / (1 + sigma.square())
        return (x * (1 + w[0]) + w[1]) * c + 0.3 * torch.tanh(w[2] * x * c.sqrt() + w[3])

    def network(self, x, sigma, w):
        """x in variance-preserving coordinates (ε, v) or in flow coordinates."""
        if self.prediction == "flow":
            sigma = as4(sigma, x)
            # at σ = 1 nothing of x0 is left in x: the limit of the same function
            x_ve, s = x / (1 - sigma).clamp(min=1e-9), sigma / (1 - sigma).clamp(min=1e-9)
            return (x - self.ideal(x_ve, s, w)) / sigma
        sigma = as4(sigma, x)
        x_ve = x * (1 + sigma.square()).sqrt()
        clean, a = self.ideal(x_ve, sigma, w), (1 + sigma.square()).rsqrt()
        epsilon = (x_ve - clean) / sigma
        return epsilon if self.prediction == "epsilon" else a * epsilon - a * sigma * clean

    def denoiser(self, prompts, *, adapter="tuned", guidance_scale=1.0, negative="", prompt_weight=1.0):
        weight = self.weights(adapter)
        return ToyDenoiser(prompts, lambda x, sigma: self.denoise(x, sigma, weight))

    def weights(self, adapter):
        return self.weight if adapter == "tuned" else STATES[adapter]

    def denoise(self, x, sigma, w):
        self.calls += len(x)
        level = as4(sigma, x)
        if self.prediction == "flow":
            return x - level * self.network(x, sigma, w)
        scale = (1 + level.square()).rsqrt()
        output = self.network(x * scale, sigma, w)
        return x - level * output if self.prediction == "epsilon" else scale.square() * x - level * scale * output

    def reads_alike(self, prompt, other):
        return prompt[:20] == other[:20]  # of a text encoder that reads 20 letters

    def merged(self):
        return nullcontext()

    def sigmas(self, steps):
        ve = torch.cat([torch.linspace(9.0, 0.1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        return ve if self.space == "ve" else ve / (1 + ve)

    def start(self, noise, steps):
        return noise.double() * (9.0 if self.space == "ve" else 0.9)

    def add_noise(self, x0, noise, sigma):
        return add_noise(x0, noise, sigma, self.space)

    def decode(self, latents):
        return latents

    def parameters(self):
        return [self.weight]


class WithLoser:
    """Mixed into a policy of the family: a second trained adapter."""

    adapters = frozenset({*Family.adapters, "tuned-loser"})

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loser = torch.nn.Parameter(torch.tensor([-0.1, 0.3, 0.2, -0.2], dtype=torch.float64))

    def weights(self, adapter):
        return self.loser if adapter == "tuned-loser" else super().weights(adapter)

    def parameters(self):
        return [self.weight, self.loser]


class Towers:
    """A smooth reward that can be asked under prefixes."""

    differentiable = True
    takes_prefixes = True

    def __call__(self, images, prompts):
        return self.scores(images, prompts, [""])[:, 0]

    def scores(self, images, prompts, prefixes):
        flat = images.flatten(1)
        return torch.stack([-(flat - 0.1 * len(p)).square().sum(1) + 0.5 * torch.sin(flat * (1 + len(p))).sum(1) for p in prefixes], 1)


def batch(n=4, number=0, seed=3, latents=True):
    z = 0.5 * torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if latents else None
    return batch_of(tuple("abcdefgh"[:n]), Rng(seed, 0, tuple(range(n))), number, z)


def gradient(policy, loss):
    (found,) = torch.autograd.grad(loss, policy.weight)
    return found


SMALL = {
    "refl": {"steps": 6, "grad_from": 3, "grad_to": 5},
    "imagerefl": {"steps": 6, "grad_from": 3, "grad_to": 5, "start_from": 2, "start_to": 4, "refl_share": 0.0},
    "draft-k": {"steps": 6, "k": 3, "guidance_scale": 1.0},
    "draft-lv": {"steps": 6, "guidance_scale": 1.0},
    "alignprop": {"steps": 6, "cut_mean": 3.0, "cut_std": 1.0, "guidance_scale": 1.0},
    "drtune": {"steps": 6, "k": 3, "early_stop": 3, "guidance_scale": 1.0},
    "flowbp-sparse": {"steps": 6, "k": 3, "guidance_scale": 1.0},
    "flowbp-bridge": {"steps": 6, "k": 4, "alpha": 0.5, "guidance_scale": 1.0},
    "flowbp-lagrange": {"steps": 6, "alpha": 0.5, "tau": 0.01, "guidance_scale": 1.0},
    "leapalign": {"steps": 6, "tau": 0.01, "guidance_scale": 1.0},
    "direct-align": {"steps": 6, "branch": "both", "levels": 2, "sigma_low": 0.3, "sigma_high": 0.85, "discount": 0.3, "shift": 2.0},
    "srpo": {"steps": 6, "branch": "both", "sigma_low": 0.3, "sigma_high": 0.85},
    "sqdf": {"steps": 6, "guidance_scale": 1.0, "buffer_gb": 0.0, "estimator": "consistency"},
}
