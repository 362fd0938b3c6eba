"""Run inside a ComfyUI: adapters of tiny models of every family get the headless trainer's gradient.

Usage: family_gradients.py COMFYUI PACK PIPELINE FAMILY=FOLDER… Prints one JSON line of relative errors, or the error of a case; families
that this ComfyUI does not know are left out.
"""

import json
import sys
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from diffusers import AutoencoderKLQwenImage, DDPMScheduler
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from tiny import described, wan_vae

sys.path.append(str(Path(__file__).parents[2] / "helpers"))
from native_names import native

pipeline = Path(embedded.arguments[0])
folders = dict(argument.split("=", 1) for argument in embedded.arguments[1:])
FrameAutoencoder = embedded.ours("trainer.models.autoencoder").FrameAutoencoder
core, graph, adapter = (embedded.ours(name) for name in ("trainer.policy", "nodes.policy", "nodes.adapter"))
core_sampling = embedded.ours("trainer.sampling")
MLP = ("ff.net.0.proj", "ff.net.2", "attn.to_out.0", "attn.to_add_out")
SINGLE = ("single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out")
TARGETS = {
    "flux": MLP + SINGLE,
    "sd3": MLP,
    "sdxl": ("to_q", "to_v", "to_out.0", "conv1", "ff.net.2", "proj_in"),
    "zimage": ("attention.to_out.0", "feed_forward.w1", "feed_forward.w2", "adaLN_modulation.0"),
    "klein": ("attn.to_out.0", "attn.to_add_out", "ff.linear_in", "attn.to_qkv_mlp_proj", "attn.to_out"),
    "krea": ("attn.to_out.0", "attn.to_q", "ff.down", "final_layer.linear"),
    "chroma": ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "single_transformer_blocks.0.proj_out"),
    "qwen": ("attn.to_out.0", "attn.add_k_proj", "img_mlp.net.2", "proj_out"),
    "anima": ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2", "norm2.linear_2", "proj_out"),
}
POLICIES = {
    **{"flux": "FluxPolicy", "sd3": "SD3Policy", "sdxl": "SDXLPolicy", "zimage": "ZImagePolicy", "klein": "KleinPolicy"},
    **{"krea": "KreaPolicy", "qwen": "QwenPolicy", "chroma": "ChromaPolicy", "anima": "AnimaPolicy"},
}
KNOWN = {
    "zimage": "ZImage",
    "klein": "Flux2",
    "krea": "Krea2",
    "qwen": "QwenImage",
    "anima": "Anima",
    "chroma": "ZImage",
}  # classes that old versions lack; their Chroma has other names
FRAMES = ("krea", "qwen", "anima")  # latents of a video autoencoder
SHIFTED = {"zimage": True, "klein": False, "krea": False}  # families with turbo models, and whether the test gives it another shift
PROMPTS = ["a red star", "a blue ring"]
results = {}


def converted(family, kind, unet_config, state, dtype, markers):
    """A MODEL with the weights `state` of a diffusers network; `markers` are tensors by which a checkpoint says its prediction."""
    state = {name: value.clone() for name, value in state.items()}
    config = kind(unet_config)
    config.set_inference_dtype(dtype, None)
    with torch.inference_mode():
        model = config.get_model(markers, "", device="cpu")
        config.sampling_settings.pop("zsnr", None)  # which ComfyUI sets for all models to come
        if family == "sdxl":
            names = comfy.utils.unet_to_diffusers(unet_config)
            state = {there: state.pop(here) for here, there in names.items() if here in state}
        else:
            state = native(state)
        model.diffusion_model.load_state_dict(state)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model.to(dtype), device, device)


def tokens(encoded):
    """A prompt's embedding without padding, as ComfyUI has it where the family masks it; several layers as one of their joint width."""
    mask, text = encoded.get("mask"), encoded["encoder_hidden_states"].flatten(2)
    return text if mask is None else text[:, : int(mask.sum())]


def conditioning(family, headless, prompt):
    """A prompt as a text encoder node of ComfyUI gives it."""
    if family == "anima":  # whose text conditioner is in the MODEL
        pipeline = headless.pipeline
        ids = pipeline.tokenizer(prompt, return_tensors="pt")
        hidden = pipeline.text_encoder(**ids).last_hidden_state.detach()
        t5 = torch.tensor(pipeline.t5_tokenizer(prompt).input_ids, dtype=torch.int)
        return [[hidden, {"pooled_output": None, "t5xxl_ids": t5, "t5xxl_weights": torch.ones(len(t5))}]]
    encoded = headless.encode_prompts([prompt])
    pooled = encoded.get("pooled_projections", encoded.get("text_embeds"))
    return [[tokens(encoded).detach(), {"pooled_output": None if pooled is None else pooled.detach()}]]


def gradient(policy, noise, levels):
    """Of a number that depends on two evaluations, the second of which sees the first's result."""
    for parameter in policy.parameters():
        parameter.grad = None
    denoise = policy.denoiser(PROMPTS)
    first = denoise(noise, levels[0].expand(2))
    second = denoise(first + 0.1 * noise, levels[1].expand(2))
    (second * torch.linspace(-1, 1, second.numel()).reshape(second.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def opened_in_graph(family, headless, dtype, shape, *markers):
    """The same weights and prompts as a MODEL in a graph, without an adapter; the MODEL."""
    network = headless.network.get_base_model() if hasattr(headless.network, "get_base_model") else headless.network
    state = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items() if ".lora_" not in name}
    if family == "anima":
        conditioner = headless.pipeline.text_conditioner.state_dict()
        state |= {f"llm_adapter.{name}": value for name, value in conditioner.items()}
    texts = {p: conditioning(family, headless, p) for p in PROMPTS}
    marked = {name: torch.zeros(0) for name in markers}
    model = converted(family, *described(family, headless.network.config), state, dtype, marked)
    with torch.inference_mode():
        vae = wan_vae() if family in FRAMES else embedded.ours("nodes.demo").load_vae(pipeline)
    return graph.ComfyPolicy(model, vae, texts.get, shape), model


def decoded(headless, noise):
    """Of one video autoencoder's weights in both hosts: errors of a decoded image, of its gradient, and of an encoded image."""
    vae, theirs = wan_vae(), AutoencoderKLQwenImage(base_dim=8)
    theirs.load_state_dict(convert_wan_vae_to_diffusers(dict(vae.first_stage_model.state_dict())))
    latents, found = 0.3 * noise, []
    policy, _ = opened_in_graph("qwen", headless, torch.float32, noise.shape[1:])
    with policy.loaded([], 2):
        for decode in (FrameAutoencoder(theirs.requires_grad_(False)).decode, policy.decode):
            x = latents.clone().requires_grad_()
            images = decode(x)
            (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum().backward()
            found.append((images.detach(), x.grad))
    images = found[0][0]
    found = [(*pair, encode(images)[0]) for pair, encode in zip(found, (FrameAutoencoder(theirs).encode, policy.encode))]
    return [float((ours - wanted).norm() / wanted.norm()) for wanted, ours in zip(*found)]


def in_graph(family, headless, dtype, checkpointing, noise, levels):
    """The gradient in a graph, by the headless names; `headless` gives weights, adapter and conditioning."""
    policy, model = opened_in_graph(family, headless, dtype, noise.shape[1:])
    policy.add_lora(core.Lora(rank=4, alpha=8.0, targets=TARGETS[family]), 3)
    inside = {alias: inner for inner, (_, aliases) in adapter.lora_targets(model.model).items() for alias in aliases}
    there, names, ours = {inner: name for (_, name), (inner, _) in policy._modules.items()}, {}, dict(policy.named_parameters())
    for name, value in headless.named_parameters():
        module, half = name.split(".lora_")
        names[name] = f"{there[inside[module]]}.lora_{half}"
        ours[names[name]].data = value.data.clone()
    assert set(names.values()) == set(ours), set(names.values()) ^ set(ours)
    policy.gradient_checkpointing(denoiser=checkpointing, vae=True)
    with policy.loaded([], 2):
        found = gradient(policy, noise, levels)
    return {name: found[here] for name, here in names.items()}


@torch.no_grad()
def zero_snr(headless, folder, noise):
    """v-prediction with zero terminal SNR, as ComfyUI reads it off a checkpoint's markers and its own sampler draws it: relative errors."""
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline = headless.load_pipeline(Path(folder), torch.float32)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **zero)
    ours = type(headless)(pipeline)
    policy, model = opened_in_graph("sdxl", headless, torch.float32, noise.shape[1:], "v_pred", "ztsnr")
    sampling, sigmas = model.get_model_object("model_sampling"), policy.sigmas(6)
    start = sampling.noise_scaling(sigmas[0], noise.clone(), torch.zeros_like(noise), max_denoise=True)
    mine = ours.denoiser(PROMPTS, adapter="base")
    drawn = core_sampling.end_of(None, core_sampling.trajectory(mine, ours.start(noise, 6), ours.sigmas(6), None, "ddim"))
    with policy.loaded([], 2):
        theirs = policy.denoiser(PROMPTS, adapter="base")
        first = theirs(start, sigmas[:1].expand(2))
        ends = sample_euler(lambda x, sigma: theirs(x, sigma.expand(2)), start, sigmas, disable=True)
    pairs = {"levels": (ours.levels, sampling.sigmas), "grid": (ours.sigmas(6)[:-1], sigmas[:-1]), "end": (drawn, ends)}
    pairs["first"] = (mine(ours.start(noise, 6), ours.sigmas(6)[:1].expand(2)), first)
    return {
        name: float((a / b - 1).abs().max() if name in ("levels", "grid") else (a - b).norm() / b.norm()) for name, (a, b) in pairs.items()
    }


@torch.no_grad()
def loaded(family, headless, noise, levels):
    """Of the headless trainer's LoRA file in the stock loader: keys that it does not know, and the error of x0 by the LoRA's effect."""
    policy, model = opened_in_graph(family, headless, torch.float32, noise.shape[1:])
    tensors = embedded.ours("trainer.lora.file").lora_tensors(headless)
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    unknown = [key for key in tensors if key.rsplit(".lora_", 1)[0].removesuffix(".alpha") not in known]
    changed = len(patched.patches), len({key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key})
    policy.model = patched
    base = headless.denoiser(PROMPTS, adapter="base")(noise, levels)
    wanted = headless.denoiser(PROMPTS)(noise, levels)
    with policy.loaded([], 2):
        found = policy.denoiser(PROMPTS, adapter="base")(noise, levels)
    return {"unknown": unknown, "changed": changed, "error": float((found - wanted).norm() / (wanted - base).norm())}


@torch.inference_mode()
def base_to_turbo(family, headless):
    """Combined KSampler over a base and a turbo MODEL with other weights and shift, against two stock samplers in a chain: the relative
    error, and the difference to the base alone.
    """

    def model(turbo=False):
        made = opened_in_graph(family, headless, torch.float32, headless.latent_shape)[1]
        for value in made.model.diffusion_model.state_dict().values() if turbo else ():
            value.mul_(1.05)
        return (
            ModelSamplingSD3().patch(made, 5.0, made.get_model_object("model_sampling").multiplier)[0]
            if turbo and SHIFTED[family]
            else made
        )

    def stock(model, sigmas, noisy, latent, seed):
        arguments = (model, noisy, seed, 2.0, positive, negative, comfy.samplers.sampler_object("euler"), sigmas, latent)
        if hasattr(custom.SamplerCustom, "execute"):
            return custom.SamplerCustom.execute(*arguments).args[0]
        return custom.SamplerCustom().sample(*arguments)[0]

    positive, negative = (conditioning(family, headless, prompt) for prompt in PROMPTS)
    # zeros would get the channels of the published model
    empty = {"samples": torch.full((1, headless.latent_shape[0], 8, 8), 1e-30 if family == "klein" else 0.0)}
    wide, short = (comfy.samplers.KSampler(model(t), n, "cpu", "euler", "simple", 1.0, {}).sigmas for t, n in ((False, 12), (True, 4)))
    sigmas = torch.cat([wide[wide > short[1] * 1.0001], short[1:]])
    between = stock(model(), sigmas[:-3], True, empty, 1)
    wanted, base = stock(model(True), sigmas[-4:], False, between, 2)["samples"], stock(model(), wide, True, empty, 1)["samples"]
    widgets = ("last steps", 3.0, 1.0, 1, 12, 2.0, 2.0, "euler", "simple")
    node = embedded.ours("nodes.combined").CombinedKSampler
    found = node.execute(model(), model(True), *widgets, positive, negative, empty, 1.0, tuned_steps=4).args[0]["samples"]
    return [float((one - wanted).norm() / wanted.norm()) for one in (found, base)]


def error(found, wanted):
    """Relative, of all modules joined."""
    found, wanted = (torch.cat([g[name].flatten().float() for name in wanted]) for g in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def opened(family, folder, dtype):
    """The headless policy with an adapter away from the identity, where half of the gradients vanish."""
    module = embedded.ours(f"trainer.models.{family}")
    headless = getattr(module, POLICIES[family]).load(folder, dtype=dtype)
    headless.add_lora(core.Lora(rank=4, alpha=8.0, targets=TARGETS[family]), 3)
    if family == "sdxl":  # ComfyUI asks the network at the nearest timestep
        between = headless.timestep
        headless.timestep = lambda sigma: between(sigma).round()
    for name, parameter in headless.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return headless


with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
    for family, folder in folders.items():
        if not hasattr(comfy.supported_models, KNOWN.get(family, "SDXL")):
            continue
        headless = opened(family, folder, torch.float32)
        noise = torch.randn(2, headless.latent_shape[0], 8, 8, generator=torch.Generator().manual_seed(1))
        levels = torch.tensor([0.7, 0.4]) if family != "sdxl" else headless.sigmas(6)[2:4]
        wanted = gradient(headless, noise, levels)
        results[f"{family}, headless bfloat16"] = error(gradient(opened(family, folder, torch.bfloat16), noise, levels), wanted)
        if family == "sdxl":
            results["zero snr"] = zero_snr(headless, folder, noise)
        if family == "qwen":
            results["decoded"] = decoded(headless, noise)
        if family in SHIFTED:
            results[f"{family}, base to turbo"] = base_to_turbo(family, headless)
        results[f"{family}, loaded"] = loaded(family, headless, noise, levels)
        for dtype in (torch.float32, torch.bfloat16):
            for kept in ("kept", "recomputed"):
                try:
                    found = error(in_graph(family, headless, dtype, kept == "recomputed", noise, levels), wanted)
                except RuntimeError as problem:
                    found = str(problem)
                results[f"{family}, {str(dtype)[6:]}, {kept}"] = found
print(json.dumps(results))
