"""The embedded model as MODEL, CLIP and VAE of ComfyUI's own classes, from the files that the headless trainer uses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, ClassVar

import comfy.diffusers_convert
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..trainer.demo import files, world
from .sockets import CATEGORY, image, schema


class EmbeddedConfig(comfy.supported_models.SD15):
    """SD1.5's latent format, schedule and prediction around a UNet of any width."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}


def unet_config(diffusers: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's description of the embedded UNet, from diffusers' config.json."""
    widths, depth = diffusers["block_out_channels"], diffusers["layers_per_block"]
    levels = len(widths)
    return {
        "image_size": 32,
        "in_channels": diffusers["in_channels"],
        "out_channels": diffusers["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": [depth] * levels,
        "channel_mult": [w // widths[0] for w in widths],
        "transformer_depth": [1] * (depth * levels),
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * ((depth + 1) * levels),
        "context_dim": diffusers["cross_attention_dim"],
        "num_heads": diffusers["attention_head_dim"],  # diffusers' name; it is the number of heads
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def _floats(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(path).items()}


def load_model(folder: Path = files.PIPELINE) -> Any:
    """The UNet as a MODEL."""
    described = unet_config(json.loads((folder / "unet" / "config.json").read_text("utf-8")))
    config = EmbeddedConfig(described)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    names = comfy.utils.unet_to_diffusers(described)
    state = _floats(folder / "unet" / "diffusion_pytorch_model.safetensors")
    model.diffusion_model.load_state_dict({there: state[here] for here, there in names.items() if here in state})
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def load_vae(folder: Path = files.PIPELINE) -> Any:
    """The autoencoder as a VAE."""
    config = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
    width = config["block_out_channels"][0]
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": width,
        "ch_mult": [w // width for w in config["block_out_channels"]],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    state = comfy.diffusers_convert.convert_vae_state_dict(_floats(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": ddconfig, "embed_dim": config["latent_channels"]}}, dtype=torch.float32)
    # not in dynamic VRAM, where training cannot take it: 3 MB
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    return vae


def load_clip(folder: Path = files.PIPELINE) -> Any:
    """Tokenizer and text encoder as a CLIP."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    width, end = config["hidden_size"], config["eos_token_id"]
    text_config = {name: config[name] for name in _TEXT_KEYS} | {"num_channels": 3}
    state = _floats(folder / "text_encoder" / "model.safetensors")
    named = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}
    table = "text_model.embeddings.token_embedding.weight"
    named[table] = torch.cat([named[table], torch.zeros(49408 - len(named[table]), width)])  # ComfyUI fixes the vocabulary's size

    class Tower(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            special = {"start": end - 1, "end": end, "pad": end}
            super().__init__(
                device=device, dtype=dtype, textmodel_json_config=text_config, special_tokens=special, model_options=model_options or {}
            )

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_name="l", clip_model=Tower)

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            tokens = functools.partial(comfy.sd1_clip.SDTokenizer, tokenizer_path=str(folder / "tokenizer"), embedding_size=width)
            super().__init__(embedding_directory, tokenizer_data or {}, clip_name="l", tokenizer=tokens)

    class Target:
        clip, tokenizer = Model, Tokenizer
        params: ClassVar[dict[str, Any]] = {}

    clip = comfy.sd.CLIP(Target, embedding_directory=None, model_options={"dtype": torch.float32})  # 1 MB: no need for half
    missing, unexpected = clip.cond_stage_model.clip_l.transformer.load_state_dict(named, strict=False)
    if unexpected or [m for m in missing if m != "text_projection.weight"]:
        raise RuntimeError(f"the embedded text encoder does not fit this ComfyUI: {(missing + unexpected)[0]}")
    return clip


_TEXT_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "eos_token_id",
)


class LoadDemoModel(io.ComfyNode):
    """-> MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDemoModel",
            display_name="Load Demo Model",
            category=f"{CATEGORY}/demo",
            description="The embedded model: a Stable Diffusion in miniature that draws one simple object, 64×64 pixels. No download. "
            "Prompts look like: a large red star on a black background, crisp, vivid.",
            search_aliases=["embedded model", "tiny stable diffusion"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="Use 20 steps and CFG 2."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="Knows the words of its world: shapes, colours, sizes, finishes."),
                io.Vae.Output("vae", display_name="VAE", tooltip="64×64 pixels to 8×8 latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load."""
        files.check_pipeline()
        return io.NodeOutput(load_model(), load_clip(), load_vae())


class DemoImages(io.ComfyNode):
    """-> IMAGE and one caption each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDemoImages",
            display_name="Demo Images",
            search_aliases=["training images", "captioned images"],
            category=f"{CATEGORY}/demo",
            description="Real images of the embedded world with their captions: training data, and a reference for FID.",
            inputs=[
                io.Int.Input("count", default=128, min=1, max=4096, tooltip="Number of images, 1 to 4096."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip="Which images."),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE", tooltip="64×64 renders."),
                io.String.Output("captions", display_name="captions", tooltip="One per line, in the order of the images."),
            ],
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        """Draw."""
        rendered, captions = world.real_images(count, seed)
        return io.NodeOutput(image(rendered), "\n".join(captions))


NODES = [LoadDemoModel, DemoImages]
