"""Shared by the scripts that run inside a ComfyUI: start it on the CPU, load the pack, build the embedded model."""

import importlib
import importlib.util
import sys
from pathlib import Path

comfy_path, pack, *arguments = sys.argv[1:]
sys.path.insert(0, comfy_path)
sys.argv = sys.argv[:1]

import torch

torch.set_num_threads(1)
from comfy.cli_args import args

args.cpu = True
import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import utils.extra_config  # noqa: F401  before `nodes`, which would hide it

spec = importlib.util.spec_from_file_location("custom_nodes.the/pack", Path(pack) / "__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)


def ours(name):
    """A module of the pack, under the foreign name that ComfyUI gives it."""
    return importlib.import_module(f"{spec.name}.{name}")


CONFIG = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 128,
    "num_heads": 4, "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
    "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip


class Embedded(comfy.supported_models.SD15):
    unet_config = {}
    unet_extra_config = {}


def build(state):
    """A ModelPatcher over a fresh model of ComfyUI's own classes, from a diffusers UNet's state."""
    model_config = Embedded(CONFIG)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "", device="cpu")
    keys = comfy.utils.unet_to_diffusers(CONFIG)
    renamed = {there: state[here].clone() for here, there in keys.items() if here in state}
    assert len(renamed) == len(state), "a UNet tensor has no ComfyUI name"
    model.diffusion_model.load_state_dict(renamed)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def with_lora(patcher, tensors, strength=1.0):
    """A clone with a LoRA as the stock loader puts it there, and how many of its modules found no weight."""
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map, log_missing=False)
    clone = patcher.clone()
    applied = clone.add_patches(patches, strength)
    return clone, sum(k.endswith(".alpha") for k in tensors) - len(applied)
