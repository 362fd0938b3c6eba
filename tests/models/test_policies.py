"""Every family's policy against diffusers' own pipeline: what the network is told, where a rollout ends, and its LoRA."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from helpers.losses import batch_of, loss_of

from trainer.generate import Generation, generate
from trainer.guidance import cfg
from trainer.lora.file import load_lora, save_lora
from trainer.models.anima import AnimaPolicy
from trainer.models.autoencoder import FrameAutoencoder
from trainer.models.chroma import ChromaPolicy
from trainer.models.flux import FluxPolicy
from trainer.models.klein import KleinPolicy
from trainer.models.krea import KreaPolicy
from trainer.models.qwen import QwenPolicy
from trainer.models.sd3 import SD3Policy
from trainer.models.sdxl import SDXLPolicy
from trainer.models.unet import UNetPolicy
from trainer.models.zimage import ZImagePolicy
from trainer.objectives import ImageReFL
from trainer.policy import Lora
from trainer.rng import Rng

PROMPTS = ["a red star", "a blue ring, blurred"]
POLICIES = {
    **{"sd15": UNetPolicy, "sdxl": SDXLPolicy, "sd3": SD3Policy, "flux-dev": FluxPolicy, "flux-schnell": FluxPolicy},
    **{"z-image": ZImagePolicy, "klein": KleinPolicy, "krea2": KreaPolicy, "qwen-image": QwenPolicy, "chroma": ChromaPolicy},
    "anima": AnimaPolicy,
}
SIZE = 64  # pixels: 8×8 latents, smaller than any of the models' own size
FAMILIES = pytest.mark.parametrize("family", POLICIES)


@pytest.fixture
def load(family_folder):
    def loaded(family, **kwargs):
        policy = POLICIES[family].load(family_folder(family), image_size=SIZE, **kwargs)
        if isinstance(policy, KreaPolicy | QwenPolicy):
            policy.max_tokens = 24  # fewer than the pipeline's default take less time
        if isinstance(policy, ChromaPolicy):  # the pipeline adds its mask to the scores of attention, see trainer.models.chroma
            inner = policy.pipeline._prepare_attention_mask
            policy.pipeline._prepare_attention_mask = lambda **given: None if (mask := inner(**given)) is None else mask.bool()
            policy.max_tokens = 40
        return policy

    return loaded


def guided(policy, scale):
    """The pipeline's arguments for guidance by a second evaluation."""
    if isinstance(policy, FluxPolicy | QwenPolicy):  # schnell was distilled with 256 tokens; the pipeline would take 512 for it too
        return {"negative_prompt": ["", ""], "true_cfg_scale": scale, "max_sequence_length": policy.max_tokens}
    if isinstance(policy, ChromaPolicy):
        return {"guidance_scale": scale, "max_sequence_length": policy.max_tokens}
    if isinstance(policy, KreaPolicy):
        return {"guidance_scale": scale - 1, "max_sequence_length": policy.max_tokens}
    if isinstance(policy, ZImagePolicy):  # cond + s·(cond − uncond)
        return {"guidance_scale": scale - 1}
    return {"guidance_scale": scale}


def drawn(policy, guidance_scale, **arguments):
    """The images that the pipeline draws of PROMPTS."""
    pipeline = policy.pipeline
    if not isinstance(policy, AnimaPolicy):
        return pipeline(prompt=list(PROMPTS), height=SIZE, width=SIZE, **arguments, **guided(policy, guidance_scale)).images
    from diffusers import ClassifierFreeGuidance

    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    arguments["output_type"] = "pt"  # it has no latents
    return pipeline(prompt=list(PROMPTS), height=SIZE, width=SIZE, output="images", **arguments)


@FAMILIES
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_rollout_ends_where_the_pipeline_ends(load, family, guidance_scale):
    """Deterministic sampling by the pipeline itself: prompts, start noise, grid, guidance, steps, decoding."""
    policy = load(family)
    settings = Generation(steps=4, guidance_scale=guidance_scale, method="ddim", seed=5)
    ours = generate(policy, PROMPTS, settings, {"": cfg(settings.base)})[""]
    pipeline = policy.pipeline
    pipeline.set_progress_bar_config(disable=True)
    start = Rng(5, 0, (0, 1)).normal("start", policy.latent_shape)
    if isinstance(policy, UNetPolicy):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    if isinstance(policy, FluxPolicy | KreaPolicy | QwenPolicy | ChromaPolicy):
        start = pipeline._pack_latents(start, *start.shape)
    if isinstance(policy, AnimaPolicy):
        start = start.unsqueeze(2)
    theirs = drawn(policy, guidance_scale, num_inference_steps=4, latents=start, output_type="pt")
    assert ours.shape == theirs.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(ours.std()) > 0.01  # not two blank pictures


@FAMILIES
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_denoiser_equals_the_pipelines_prediction_at_every_step(load, family, guidance_scale, monkeypatch):
    """What the pipeline hands its scheduler, turned into a clean latent by the scheduler or by hand."""
    policy = load(family)
    pipeline = policy.pipeline
    pipeline.set_progress_bar_config(disable=True)
    flow = policy.space == "flow"
    if not flow:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    seen = []
    step = pipeline.scheduler.step
    monkeypatch.setattr(pipeline.scheduler, "step", lambda out, t, x, **k: (seen.append((out, t, x)), step(out, t, x, **k))[1])
    drawn(policy, guidance_scale, num_inference_steps=3, output_type="latent")
    assert len(seen) == 3
    denoiser = policy.denoiser(PROMPTS, guidance_scale=guidance_scale)
    for output, t, x in seen:
        if flow:
            sigma = t / 1000
            expected = x - sigma * output
        else:
            sigma = policy.levels[int(t)].float()
            expected, x = step(output, t, x).pred_original_sample, x * (1 + sigma.square()).sqrt()
        if isinstance(policy, FluxPolicy | ChromaPolicy):
            x, expected = (pipeline._unpack_latents(part, SIZE, SIZE, 8) for part in (x, expected))
        if isinstance(policy, QwenPolicy):
            x, expected = (pipeline._unpack_latents(part, SIZE, SIZE, 8).squeeze(2) for part in (x, expected))
        if isinstance(policy, KreaPolicy):
            x, expected = (pipeline._unpack_latents(part, SIZE, SIZE).squeeze(2) for part in (x, expected))
        if isinstance(policy, AnimaPolicy):
            x, expected = x.squeeze(2), expected.squeeze(2)
        if isinstance(policy, KleinPolicy):
            x, expected = (part.mT.reshape(2, *policy.latent_shape) for part in (x, expected))
        with torch.no_grad():
            ours = policy.denoiser(PROMPTS, guidance_scale=guidance_scale)(x, sigma.expand(2))
            assert torch.equal(ours, denoiser(x, sigma.expand(2)))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert float((ours - x).std()) > 0.01


@FAMILIES
def test_pixels_and_latents_are_scaled_once(load, family):
    policy = load(family)
    vae, config = policy.pipeline.vae, policy.pipeline.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mean, std = policy.encode(images)
    with torch.no_grad():
        if isinstance(policy.autoencoder, FrameAutoencoder):
            posterior = vae.encode(2 * images.unsqueeze(2) - 1).latent_dist
            means, deviations = (torch.tensor(value).reshape(16, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
            torch.testing.assert_close(mean, ((posterior.mean - means) / deviations).squeeze(2))
            torch.testing.assert_close(std, (posterior.std / deviations).squeeze(2))
            return  # decoding: where a rollout ends
        posterior = vae.encode(2 * images - 1).latent_dist
        if isinstance(policy, KleinPolicy):
            torch.testing.assert_close(mean, policy.pipeline._encode_vae_image(2 * images - 1, None))
            deviation = policy.pipeline._patchify_latents(posterior.std)
            torch.testing.assert_close(std, deviation / (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None])
            return  # decoding: where a rollout ends
        torch.testing.assert_close(mean, (posterior.mean - shift) * config.scaling_factor)
        torch.testing.assert_close(std, posterior.std * config.scaling_factor)
        pixels = policy.pipeline.image_processor.postprocess(vae.decode(mean / config.scaling_factor + shift).sample, "pt")
        torch.testing.assert_close(policy.decode(mean), pixels)
    assert policy.latent_shape == tuple(mean.shape[1:])


@FAMILIES
def test_diffusers_loads_every_key_of_a_saved_lora_and_predicts_the_same(load, family, tmp_path, caplog):
    policy = load(family)
    policy.add_lora(Lora(rank=4, alpha=6.0))
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    save_lora(policy, tmp_path / "a.safetensors", {})
    x, sigma = torch.randn(2, *policy.latent_shape, generator=rng), torch.tensor([0.9, 0.3])
    theirs, again = load(family), load(family)
    with torch.no_grad():
        base = theirs.denoiser(PROMPTS)(x, sigma)
        theirs.pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
        load_lora(again, tmp_path / "a.safetensors")
        tuned = policy.denoiser(PROMPTS)(x, sigma)
        assert float((tuned - base).abs().max()) > 1e-3
        torch.testing.assert_close(theirs.denoiser(PROMPTS)(x, sigma), tuned, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.denoiser(PROMPTS)(x, sigma), tuned, rtol=1e-6, atol=5e-6)
    adapted = {n.rsplit(".lora_A", 1)[0] for n, _ in theirs.network.named_parameters() if ".lora_A." in n}
    assert adapted == {n.rsplit(".lora_A", 1)[0] for n, _ in policy.named_parameters() if ".lora_A." in n}
    assert not [r.getMessage() for r in caplog.records if "unexpected" in r.getMessage() and "No LoRA keys" not in r.getMessage()]


def brightness(images, prompts):
    return images.flatten(1).mean(1)


brightness.differentiable = True


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_of_imagerefl_reaches_every_adapter_parameter(load, family, dtype):
    policy = load(family, dtype=dtype)
    policy.add_lora(Lora(rank=2, alpha=2.0), seed=1)
    policy.gradient_checkpointing(denoiser=True, vae=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:  # at their zero start, B alone has a gradient
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    objective = ImageReFL(steps=4, grad_from=2, grad_to=3, start_from=2, start_to=2, refl_share=0.0, diffusion_weight=0.1, kl_weight=0.1)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    loss, logs = loss_of(objective, policy, batch_of(tuple(PROMPTS), Rng(0, 0, (0, 1)), 0, latents), brightness)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and float(logs["kl"].mean()) > 0
    for name, p in policy.named_parameters():
        assert p.dtype == torch.float32
        # the last block of SD3 and Qwen-Image drops the text after attention
        last = family in ("sd3", "qwen-image") and any(f".1.attn.{part}." in name for part in ("add_q_proj", "to_add_out"))
        assert last or (p.grad is not None and bool(torch.isfinite(p.grad).all()) and float(p.grad.abs().max()) > 0), name
    assert all(p.grad is None for n, p in policy.network.named_parameters() if ".lora_" not in n)


def embeddings(policy):
    return policy.prompts.conditioning(PROMPTS)["encoder_hidden_states"]


def outputs(policy, guidance_scale=1.0, adapter="tuned"):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS, adapter=adapter, guidance_scale=guidance_scale)(x, torch.tensor([0.8, 0.4]))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_named_adapters_share_one_network_and_switching_restores_everything(load, family):
    policy = load(family)
    base = outputs(policy)
    policy.add_lora(Lora(rank=2, alpha=2.0))
    frozen = policy.adapters.attach("consistency", Lora(rank=3, alpha=3.0, targets=("to_q",)))
    with torch.no_grad():
        for name in ("tuned", "consistency"):
            for p in policy.adapters.parameters(name).values():
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7 if name == "tuned" else 11)))
    trained = {n for n, p in policy.network.named_parameters() if p.requires_grad}
    tuned = outputs(policy)
    other = outputs(policy, adapter="consistency")
    with policy.adapters.using("consistency"):
        assert torch.equal(outputs(policy, adapter="base"), base)
    assert torch.equal(outputs(policy, adapter="base"), base)
    assert torch.equal(outputs(policy), tuned)
    assert all(not torch.allclose(a, b) for a, b in ((tuned, base), (other, base), (tuned, other)))
    assert {n for n, p in policy.network.named_parameters() if p.requires_grad} == trained
    assert {n for n, _ in policy.named_parameters()} == trained and trained.isdisjoint(frozen)


@pytest.mark.parametrize(("family", "unit"), [("sd15", 8), ("flux-dev", 16)])
def test_image_sizes_that_do_not_fit_are_refused(family_folder, family, unit):
    kind, folder = POLICIES[family], family_folder(family)
    with pytest.raises(ValueError, match=f"multiples of {unit}"):
        kind.load(folder, image_size=(64, 60))
    policy = kind.load(folder, image_size=(96, 64))
    assert policy.latent_shape[1:] == (12, 8) and policy.image_size == (96, 64)
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape == (1, 3, 96, 64)
    assert outputs(policy).shape == (2, *policy.latent_shape)
    with pytest.raises(ValueError, match="float16 loses"):
        kind.load(folder, dtype=torch.float16)


def test_fluxs_grid_grows_with_the_image(family_folder):
    small, large = (FluxPolicy.load(family_folder("flux-dev"), image_size=s).sigmas(8) for s in (64, 1024))
    assert float(small[0]) == float(large[0]) == 1.0 and float(small[-1]) == 0.0
    assert bool((large[1:-1] > small[1:-1]).all())


@pytest.mark.parametrize(("family", "tokens"), [("flux-dev", 512), ("flux-schnell", 256)])
def test_schnell_reads_half_of_devs_tokens(load, family, tokens):
    """It was distilled with 256 (the model's card); 0.1.0 gave it 512."""
    policy = load(family)
    assert policy.max_tokens == tokens and embeddings(policy).shape[1] == tokens


def test_bfloat16_weights_give_float32_predictions_close_to_float32(load):
    exact, rounded = load("sdxl"), load("sdxl", dtype=torch.bfloat16)
    a, b = outputs(exact, 3.0), outputs(rounded, 3.0)
    assert (
        b.dtype == torch.float32
        and rounded.decode(b).dtype == torch.float32
        and rounded.encode(rounded.decode(b))[0].dtype == torch.float32
    )
    assert 0 < float((a - b).abs().max()) < 0.05


def test_sd3_without_t5_equals_the_pipeline_without_t5(family_folder):
    import diffusers

    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(family_folder("sd3"), text_encoder_3=None, tokenizer_3=None)
    policy = SD3Policy(pipeline, image_size=SIZE)
    theirs = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[0]
    assert torch.equal(embeddings(policy), theirs) and outputs(policy).shape == (
        2,
        *policy.latent_shape,
    )


def test_a_schedule_without_signal_at_its_end_stays_finite(family_folder):
    """Zero terminal SNR (arXiv:2305.08891): ᾱ of the last timestep is 0, and σ would be infinite."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(family_folder("sd15"), safety_checker=None)
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    policy = UNetPolicy(pipeline)
    x, cond = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        embeddings(policy),
    )
    for t in (401, 976, 999):
        sigma = policy.levels[t].float()
        with torch.no_grad():
            output = pipeline.unet(x, t, encoder_hidden_states=cond).sample
            ours = policy.denoiser(PROMPTS)(x * (1 + sigma.square()).sqrt(), sigma.expand(2))
        expected = pipeline.scheduler.step(output, t, x).pred_original_sample
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-3)


def test_zero_terminal_snr_starts_at_the_last_timestep_and_ends_where_the_pipeline_ends(load):
    """v-prediction with `trailing` timesteps (arXiv:2305.08891), as NoobAI's and Illustrious' v-prediction models."""
    pipeline = load("sdxl").pipeline
    pipeline.set_progress_bar_config(disable=True)
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, **zero)
    policy = SDXLPolicy(pipeline, image_size=SIZE)
    settings = Generation(steps=4, guidance_scale=3.0, method="ddim", seed=5)
    ours = generate(policy, PROMPTS, settings, {"": cfg(settings.base)})[""]
    start = Rng(5, 0, (0, 1)).normal("start", policy.latent_shape)
    given = {"num_inference_steps": 4, "latents": start, "height": SIZE, "width": SIZE, "output_type": "pt", "guidance_scale": 3.0}
    theirs = pipeline(prompt=list(PROMPTS), **given).images
    assert [round(float(s), 2) for s in policy.sigmas(4)[:2]] == [4518.76, 5.4]  # as ComfyUI has them
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    pipeline.scheduler.register_to_config(timestep_spacing="leading")
    assert float((pipeline(prompt=list(PROMPTS), **given).images - theirs).abs().max()) > 1e-2
