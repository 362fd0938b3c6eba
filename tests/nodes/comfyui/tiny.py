"""Small random models that ComfyUI's stock loaders take for Stable Diffusion 1.5 and 3."""

import embedded  # first: it puts ComfyUI on the path
import comfy.cldm.cldm
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ldm.wan.vae
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import torch

SD15 = {
    "image_size": 32, "in_channels": 4, "model_channels": 320, "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
    "num_heads": 8, "num_head_channels": -1, "use_spatial_transformer": True, "context_dim": 768, "use_linear_in_transformer": False,
    "legacy": False, "adm_in_channels": None,
}  # fmt: skip

OUTER = {"transformer_depth_output": [0, 0], "transformer_depth_middle": -1}  # the parts that a ControlNet lacks


def _random(module, seed):
    """Weights small enough for finite pictures; norms start as the identity."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=rng) / value[0].numel() ** 0.5
        else:
            state[name] = torch.ones_like(value) if "norm" in name and name.endswith("weight") else torch.zeros_like(value)
    return state


def unet_state(seed):
    """An SD1.5-class UNet of one level, 16 M parameters."""
    kind = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    config = {**SD15, "out_channels": 4, **OUTER}
    state = _random(kind(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init), seed)
    # ComfyUI fills these group norms by name only
    return {n: torch.ones_like(v) if v.ndim == 1 and _scales(n, state) else v for n, v in state.items()}


def _scales(name, state):
    """Whether a vector multiplies: the weight of a norm, which has no matrix of that name."""
    return name.endswith(".weight") and state[name].ndim == 1


def sd15(seed):
    """MODEL, as the stock loader makes it."""
    return comfy.sd.load_diffusion_model_state_dict(unet_state(seed))


def described(family, config):
    """ComfyUI's class of a family's model configuration, and its description of the network."""
    if family == "sdxl":
        return comfy.supported_models.SDXL, {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
            "transformer_depth": [0, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2], "context_dim": 64,
            "num_heads": -1, "num_head_channels": 16, "use_spatial_transformer": True, "use_linear_in_transformer": True,
            "adm_in_channels": 6 * 256 + 32, "num_classes": "sequential", "legacy": False, "use_temporal_attention": False,
        }  # fmt: skip
    if family == "sd3":
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": config["joint_attention_dim"], "out_features": 128}}
        return comfy.supported_models.SD3, {
            "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": config["pooled_projection_dim"],
            "context_embedder_config": embedder, "num_patches": config["pos_embed_max_size"] ** 2, "qk_norm": "rms",
            "pos_embed_max_size": config["pos_embed_max_size"], "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
        }  # fmt: skip
    if family == "zimage":
        return comfy.supported_models.ZImage, {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": config["dim"], "cap_feat_dim": config["cap_feat_dim"],
            "n_layers": config["n_layers"], "n_refiner_layers": config["n_refiner_layers"], "n_heads": config["n_heads"],
            "n_kv_heads": config["n_kv_heads"], "qk_norm": True, "axes_dims": list(config["axes_dims"]), "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "multiple_of": 1, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }  # fmt: skip
    if family == "klein":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return comfy.supported_models.Flux2, {
            "image_model": "flux2", "in_channels": config["in_channels"], "out_channels": config["in_channels"], "patch_size": 1,
            "vec_in_dim": None, "context_in_dim": config["joint_attention_dim"], "hidden_size": width, "mlp_ratio": 3.0,
            "num_heads": config["num_attention_heads"], "depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(config["axes_dims_rope"]), "theta": 2000, "qkv_bias": False, "ops_bias": False, "global_modulation": True,
            "mlp_silu_act": True, "guidance_embed": False, "txt_ids_dims": [3], "default_ref_method": "index", "ref_index_scale": 10.0,
        }  # fmt: skip
    if family == "krea":
        return comfy.supported_models.Krea2, {
            "image_model": "krea2", "features": config["num_attention_heads"] * config["attention_head_dim"], "channels": 16, "patch": 2,
            "layers": config["num_layers"], "heads": config["num_attention_heads"], "kvheads": config["num_key_value_heads"],
            "tdim": config["timestep_embed_dim"], "txtlayers": config["num_text_layers"], "txtdim": config["text_hidden_dim"],
            "txtheads": config["text_num_attention_heads"], "txtkvheads": config["text_num_key_value_heads"],
        }  # fmt: skip
    if family == "chroma":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return comfy.supported_models.Chroma, {
            "image_model": "chroma", "in_channels": config["in_channels"], "out_channels": config["in_channels"], "patch_size": 2,
            "context_in_dim": config["joint_attention_dim"], "hidden_size": width, "mlp_ratio": 4.0, "qkv_bias": True,
            "num_heads": config["num_attention_heads"], "depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(config["axes_dims_rope"]), "theta": 10000, "in_dim": config["approximator_num_channels"], "out_dim": width,
            "hidden_dim": config["approximator_hidden_dim"], "n_layers": config["approximator_layers"], "txt_ids_dims": [],
            "vec_in_dim": None,
        }  # fmt: skip
    if family == "qwen":
        return comfy.supported_models.QwenImage, {
            "image_model": "qwen_image", "in_channels": config["in_channels"], "num_layers": config["num_layers"],
            "attention_head_dim": config["attention_head_dim"], "num_attention_heads": config["num_attention_heads"],
            "joint_attention_dim": config["joint_attention_dim"], "axes_dims_rope": tuple(config["axes_dims_rope"]),
        }  # fmt: skip
    if family == "anima":
        inner = comfy.ldm.anima.model.LLMAdapter  # whose size its class states
        sizes = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_heads": 2}
        comfy.ldm.anima.model.LLMAdapter = lambda **given: inner(**{**given, **sizes})
        return comfy.supported_models.Anima, {
            "image_model": "anima", "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "max_img_h": 240,
            "max_img_w": 240, "max_frames": 128, "model_channels": config["num_attention_heads"] * config["attention_head_dim"],
            "num_blocks": config["num_layers"], "num_heads": config["num_attention_heads"], "use_adaln_lora": True,
            "adaln_lora_dim": config["adaln_lora_dim"], "crossattn_emb_channels": config["text_embed_dim"], "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
            "rope_enable_fps_modulation": False,
        }  # fmt: skip
    more = {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__ else {}
    return comfy.supported_models.Flux, {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 32, "context_in_dim": 64,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 4, 8], "theta": 10000,
        "qkv_bias": True, "guidance_embed": True, **more,
    }  # fmt: skip


def control_net(seed):
    """A ControlNet for that UNet: its last, zero-initialised convolutions are random here, so that it has an effect."""
    config = {**SD15, "hint_channels": 3, "transformer_depth_middle": -1}
    network = comfy.cldm.cldm.ControlNet(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    state = _random(network, seed)
    network.load_state_dict({n: torch.ones_like(v) if v.ndim == 1 and _scales(n, state) else 0.2 * v for n, v in state.items()})
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))


def sd3(seed):
    """A flow MODEL of the SD3 class, 2 M parameters."""
    kind = comfy.ldm.modules.diffusionmodules.mmdit.MMDiT
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    network = kind(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=2048, context_embedder_config=embedder, num_patches=1024,
        pos_embed_max_size=32, pos_embed_scaling_factor=None, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return comfy.sd.load_diffusion_model_state_dict(_random(network, seed))


def wan_vae():
    """A small random VAE of Wan 2.1's and Qwen-Image's kind."""
    kind = comfy.ldm.wan.vae.WanVAE
    state = _random(kind(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]), 4)
    comfy.ldm.wan.vae.WanVAE = lambda **config: kind(**{**config, "dim": 8})  # older loaders know one size
    try:
        return comfy.sd.VAE(sd={n: torch.ones_like(v) if n.endswith("gamma") else v for n, v in state.items()}, dtype=torch.float32)
    finally:
        comfy.ldm.wan.vae.WanVAE = kind


def random_lora(model, seed, targets):
    """A LoRA of a model as our trainer writes it, with weights that matter."""
    policy = embedded.ours("nodes.policy").ComfyPolicy(model, None, None, (4, 8, 8), gradient_vae=object())
    with torch.inference_mode(False), torch.no_grad():
        policy.add_lora(embedded.ours("trainer.policy").Lora(rank=4, alpha=4.0, targets=targets), seed)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name))))
    return embedded.ours("trainer.lora.file").lora_tensors(policy)


def write_checkpoint(path, seed):
    """A whole SD1.5-class checkpoint that CheckpointLoaderSimple takes: tiny UNet, TAESD, CLIP-L of the real size."""
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    parts = {
        "model.diffusion_model.": unet_state(seed),
        "first_stage_model.": _random(comfy.taesd.taesd.TAESD(latent_channels=4), seed) | {"vae_scale": torch.ones(1)},
        "cond_stage_model.transformer.": {n if n.startswith("text_model") else f"text_model.{n}": v for n, v in text.state_dict().items()},
    }
    halved = {prefix: [(n, v.half() if "stage_model" in prefix else v) for n, v in state.items()] for prefix, state in parts.items()}
    save_file({prefix + n: v.contiguous() for prefix, state in halved.items() for n, v in state}, path)


if __name__ == "__main__":  # tiny.py COMFYUI PACK CHECKPOINT LORA
    from safetensors.torch import save_file

    checkpoint, lora = embedded.arguments
    write_checkpoint(checkpoint, 1)
    save_file(random_lora(sd15(1), 2, ("to_q", "to_k", "to_v", "to_out.0")), lora)
