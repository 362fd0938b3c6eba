"""The UNet policy against diffusers' own pipeline arithmetic, and its adapter's manners."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from helpers.losses import loss_of
from helpers.unet import OBJECTIVE, PROMPTS, brightness, image_batch

from trainer.generate import Generation, generate
from trainer.guidance import cfg, combined
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.sampling import step


def randomise_adapter(policy, scale=0.05):
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoiser_equals_diffusers_prediction_of_the_clean_latent(pipeline_folder, guidance_scale, prediction):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    policy = UNetPolicy(pipeline)
    x_vp, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 401
    cond, uncond = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    with torch.no_grad():
        of_cond, of_uncond = (pipeline.unet(x_vp, t, encoder_hidden_states=c).sample for c in (cond, uncond))
        output = of_uncond + guidance_scale * (of_cond - of_uncond)
        expected = pipeline.scheduler.step(output, t, x_vp).pred_original_sample
        sigma = policy.levels[t].float()
        ours = policy.denoiser(PROMPTS, guidance_scale=guidance_scale)(x_vp * (1 + sigma.square()).sqrt(), sigma.expand(2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_combined_generation_ends_where_the_diffusers_pipeline_ends(pipeline_folder, policy):
    """The whole path: prompts, start noise, guidance, ancestral steps, decoding."""
    settings = Generation(steps=6, guidance_scale=3.0, seed=5)
    ours = generate(policy, PROMPTS, settings, {"": cfg(settings.base)})[""]
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    rng = Rng(5, 0, (0, 1))
    noises = [rng.normal(f"step {i}", (4, 8, 8)) for i in range(5)]

    class Replay(DDPMScheduler):
        def step(self, output, t, x, **_):
            i = int((self.timesteps == t).nonzero()[0, 0])
            mean = super().step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            if i == 5:
                return (mean,)
            drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
            return (mean + self._get_variance(t) ** 0.5 * (noises[i] - drawn),)

    pipeline.scheduler = Replay.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPTS, num_inference_steps=6, guidance_scale=3.0, latents=rng.normal("start", (4, 8, 8)), output_type="pt", height=64, width=64
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_timesteps_are_exact_on_the_table_and_monotone_between(policy):
    assert torch.equal(policy.timestep(policy.levels.float()), torch.arange(1000.0))
    between = (policy.levels[10:12].log().mean()).exp()[None]
    assert 10 < float(policy.timestep(between)) < 11


def test_reference_is_the_base_model_and_denoiser_the_tuned(pipeline_folder, policy):
    base = UNetPolicy.load(pipeline_folder)
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([2.0, 0.5])
    policy.add_lora(Lora(rank=4, alpha=8.0))
    with torch.no_grad():
        before = base.denoiser(PROMPTS)(x, sigma)
        assert torch.equal(policy.denoiser(PROMPTS)(x, sigma), before)  # the adapter starts as the identity
        randomise_adapter(policy)
        assert torch.equal(policy.denoiser(PROMPTS, adapter="base")(x, sigma), before)
        assert not torch.allclose(policy.denoiser(PROMPTS)(x, sigma), before)


def test_toggling_the_adapter_restores_what_is_trained(policy):
    policy.add_lora(Lora(rank=2, alpha=2.0))
    trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters()}
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    policy.denoiser(["a star"], adapter="base")(x, sigma)
    assert {name for name, p in policy.network.named_parameters() if p.requires_grad} == trained
    policy.denoiser(["a star"])(x, sigma).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    for p in policy.parameters():
        p.requires_grad_(False)
    policy.denoiser(["a star"], adapter="base")(x, sigma)
    assert not any(p.requires_grad for p in policy.parameters())


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(policy):
    policy.add_lora(Lora(rank=4, alpha=4.0))
    randomise_adapter(policy)
    gradients = []
    for on in (False, True):
        policy.gradient_checkpointing(denoiser=on, vae=on)
        for p in policy.parameters():
            p.grad = None
        loss_of(OBJECTIVE, policy, image_batch(policy), brightness)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_switch_sweep_shares_noise_and_meets_both_ends(policy, pipeline_folder):
    """k = T is base-only sampling and k = 0 tuned-only, bit for bit; a sweep equals single runs."""
    base = UNetPolicy.load(pipeline_folder)
    policy.add_lora(Lora(rank=4, alpha=4.0))
    randomise_adapter(policy)
    settings = Generation(steps=5, guidance_scale=2.0, seed=1)
    mixes = {k: combined(settings.base, settings.tuned(), k) for k in (0, 3, 5)}
    swept = generate(policy, PROMPTS, settings, mixes)
    assert torch.equal(swept[5], generate(base, PROMPTS, settings, {"": cfg(settings.base)})[""])
    assert torch.equal(swept[3], generate(policy, PROMPTS, settings, {3: mixes[3]})[3])
    assert torch.equal(swept[0], tuned_only(policy, settings))
    assert not torch.equal(swept[0], swept[5])


def tuned_only(policy, settings):
    """Tuned-only sampling written out: the adapter on, no switch anywhere."""
    rng, sigmas = Rng(settings.seed, 0, (0, 1)), policy.sigmas(settings.steps)
    with torch.no_grad():
        x = policy.start(rng.normal("start", (4, 8, 8)), settings.steps)
        denoiser = policy.denoiser(PROMPTS, guidance_scale=settings.tuned_guidance_scale)
        for i in range(settings.steps):
            here, there = sigmas[i].expand(2), sigmas[i + 1].expand(2)
            noise = rng.normal(f"step {i}", (4, 8, 8)) if i + 1 < settings.steps else None
            x = step(x, denoiser(x, here), here, there, noise, 0.0 if noise is None else 1.0)
        return policy.decode(x)


def test_each_prompt_is_encoded_once(policy):
    calls = []
    policy.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    policy.prompts.conditioning(["a star", "a ring", "a star"])
    policy.prompts.conditioning(["a ring", "a star"])
    assert len(calls) == 2


def test_masks_of_prompts_keep_their_dtype(pipeline_folder, monkeypatch):
    """Embeddings are in the network's dtype; a boolean mask or numbers of tokens, which some families have, are not."""
    policy = UNetPolicy.load(pipeline_folder, dtype=torch.bfloat16)
    embed = policy.encode_prompts

    def encode(prompts):
        tokens = embed(prompts)["encoder_hidden_states"]
        return {"encoder_hidden_states": tokens, "mask": torch.ones(tokens.shape[:2], dtype=torch.bool), "length": torch.tensor([1001])}

    monkeypatch.setattr(policy, "encode_prompts", encode)
    for scale in (1.0, 2.0):
        found = policy.denoiser(PROMPTS, guidance_scale=scale).conditioning
        assert [found[key].dtype for key in ("encoder_hidden_states", "mask", "length")] == [torch.bfloat16, torch.bool, torch.int64]
        assert found["length"].tolist() == [1001] * (2 if scale == 1 else 4)  # bfloat16 would make 1000 of it
