"""Pairs, labels and captioned images, and denoising errors written up in the network's own prediction."""

from __future__ import annotations

import torch
from helpers.family import STATES, Family, as4, gradient
from helpers.losses import batch_of

from trainer.data.batches import Labels, Pairs
from trainer.objectives import RunContext
from trainer.rng import Rng

N = 4
PROMPTS = ("a red star", "two cats", "a large ring", "the left door")


def pairs(number=0, n=N):
    rng = torch.Generator().manual_seed(7 + number)
    chosen, rejected = (0.7 * torch.randn(n, 3, 1, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    return Pairs(PROMPTS[:n], Rng(3, number, tuple(range(n)), number), number, chosen, rejected)


def labels():
    batch = pairs()
    return Labels(batch.prompts, batch.rng, 0, batch.chosen, torch.tensor([1.0, -1.0, -1.0, 1.0]))


def images():
    batch = pairs()
    return batch_of(batch.prompts, batch.rng, 0, batch.chosen)


class Captioned(Family):
    """The family's policy, whose predictions depend on the length of the prompt."""

    def denoiser(self, prompts, **settings):
        inner = super().denoiser(prompts, **settings)
        inner.function = lambda x, sigma, plain=inner.function: plain(x, sigma) + as4(torch.tensor([0.2 * len(p) for p in prompts]), x)
        return inner


def written_up(policy, batch, latents, prompts, weight):
    """Squared errors (B,) of the network's own prediction against its own target, and the errors (B,C,h,w), with uniform draws."""
    sigma = policy.sigmas(999)[(batch.rng.uniform("noise level") * 999).floor().long()]
    noise, s = batch.rng.normal("diffusion noise", (3, 1, 1)).double(), as4(sigma, latents)
    shift = as4(torch.tensor([0.2 * len(p) for p in prompts]), latents)
    if policy.prediction == "flow":
        x = (1 - s) * latents + s * noise
        error = policy.network(x, sigma, weight) - shift / s - (noise - latents)
        return error.square().mean((1, 2, 3)), error
    a = (1 + s.square()).rsqrt()
    output = policy.network(a * (latents + s * noise), sigma, weight)
    if policy.prediction == "epsilon":
        return (output - shift / s - noise).square().mean((1, 2, 3)), output - shift / s - noise
    error = output - shift / (a * s) - (a * noise - a * s * latents)
    return error.square().mean((1, 2, 3)), error


def both(policy, batch, latents, prompts=None):
    return [written_up(policy, batch, latents, prompts or batch.prompts, w)[0] for w in (policy.weight, STATES["base"])]


def by_dpo(policy, settings, chosen, rejected):
    (better, b), (worse, w) = chosen, rejected
    return -torch.log(1 / (1 + torch.exp(settings.beta / 2 * ((better - b) - (worse - w)))))


def by_kto(gain, liked, beta):
    z = max(0.0, float(gain.detach().mean()))
    return torch.stack([1 - 1 / (1 + torch.exp(-beta * (1 if good else -1) * (g - z))) for g, good in zip(gain, liked)])


def loss_and_gradient(objective, batch, prediction="epsilon", policy=None):
    policy = policy or Captioned(prediction)
    loss, logs = objective.begin(RunContext(policy, prompts=PROMPTS))(batch)
    return loss.detach(), gradient(policy, loss), logs
