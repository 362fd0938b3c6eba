"""Two-model guidance against the authors' own pipelines: latents that those gave, on the same weights, noise and steps."""

from __future__ import annotations

import pytest
import torch

from trainer.demo import files
from trainer.generate import slot_denoiser
from trainer.guidance import Slot, weighted_sum
from trainer.guides import CHATS, NPO, RLGuidance
from trainer.lora.several import load_loras
from trainer.models.prompted import PromptedDenoiser
from trainer.models.sd3 import SD3Policy
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.sampling import end_of, trajectory

STEPS, PROMPT = 6, "a large red star, vivid"

# The pipelines ran on a CPU in float32 with six steps of diffusers' DDIMScheduler (spacing `leading`, offset 1) or, for RL guidance, of
# FlowMatchEulerDiscreteScheduler. Mean and standard deviation of the final latents, and some of them.
# AIDC-AI/CHATS at edbded1, pipelines/pipeline_sd15.py with 'cpu' for 'cuda', scale 5, α 0.5, seed 0: the embedded model with the LoRA
# demo-imagerefl as winner, with demo-refl as loser.
OFFICIAL_CHATS = [0.706419, 2.566123, 1.075789, -0.168645, -2.183433, -0.371108, 7.038389, 1.205384, -2.994443]
# G-U-N/Diffusion-NPO at a14f1db, pipeline_stable_diffusion_double_unet.py, scale 7.5: the negative model has demo-imagerefl and 0.7 of
# demo-refl.
OFFICIAL_NPO = [-0.130149, 3.808107, -1.077403, 4.91802, -3.823995, -1.09955, 10.111151, -2.711332, -6.520273]
# jinluo12345/Reinforcement-learning-guidance at 57935df, sd3_pipeline_with_rlg.py, deterministic, guidance 4.5, w 1.6: the weights below.
OFFICIAL_RLG = [0.085398, 2.936847, -5.230785, -4.00602, -4.798663, -3.346654, -7.076177, -0.317426, 1.825137, 0.816446]


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digest(latents, every):
    return [float(v) for v in (latents.mean(), latents.std(correction=0), *latents.flatten()[::every])]


def with_loras(*loras):
    policy = UNetPolicy.load(files.PIPELINE)
    load_loras(policy, [(files.loras()[name], strength) for name, strength in loras])
    return policy


@torch.no_grad()
def drawn(mix, denoiser_of, policy, noise, space="ve"):
    sigmas = policy.sigmas(STEPS)
    denoise = weighted_sum([(denoiser_of(slot), value) for slot, value in mix.at(0, float(sigmas[0]))])
    start = policy.start(noise, STEPS)
    return end_of(start, trajectory(denoise, start, sigmas, lambda i: noise, "ddim", space=space))


@pytest.fixture(scope="module")
def winner():
    return with_loras(("demo-imagerefl", 1.0))


@pytest.mark.parametrize(
    ("guide", "scale", "loras", "official"),
    [
        (CHATS(0.5), 5.0, [("demo-refl", 1.0)], OFFICIAL_CHATS),
        (NPO(), 7.5, [("demo-imagerefl", 1.0), ("demo-refl", 0.7)], OFFICIAL_NPO),
    ],
)
def test_guidance_by_a_second_model_is_that_of_the_official_pipeline(guide, scale, loras, official, winner):
    policies = {"w": winner, "l": with_loras(*loras)}
    mix = guide.mix(Slot("tuned", scale, "l"), Slot("tuned", 1.0, "w"), winner.sigmas(STEPS))
    found = drawn(mix, lambda slot: slot_denoiser(policies, slot, [PROMPT]), winner, normal((1, 4, 8, 8), 0))
    assert digest(found, 37) == pytest.approx(official, rel=1e-5, abs=3e-5)


def test_rl_guidance_of_a_flow_model_is_that_of_the_official_pipeline(family_folder):
    """Weights, LoRA and embeddings are drawn here, by name."""
    policy = SD3Policy.load(family_folder("sd3"), image_size=64)
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(policy.network.named_parameters())):
            p.copy_(normal(p.shape, i) / (p[0].numel() ** 0.5 if p.ndim > 1 else 10.0))
        policy.add_lora(Lora(rank=4, alpha=8.0))
        for i, (_, p) in enumerate(sorted(policy.named_parameters())):
            p.copy_(0.2 * normal(p.shape, 1000 + i))
    width = policy.network.config
    embeddings = {"encoder_hidden_states": normal((2, 20, width.joint_attention_dim), 1)}
    embeddings["pooled_projections"] = normal((2, width.pooled_projection_dim), 2)
    mix = RLGuidance(1.6).mix(Slot("base", 4.5), Slot("tuned"), policy.sigmas(STEPS))
    found = drawn(
        mix,
        lambda slot: PromptedDenoiser(policy, slot.adapter, slot.guidance_scale, embeddings),
        policy,
        normal((1, *policy.latent_shape), 3),
        "flow",
    )
    assert digest(found, 131) == pytest.approx(OFFICIAL_RLG, rel=1e-5, abs=3e-5)
