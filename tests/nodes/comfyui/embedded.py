"""Shared by the scripts that run inside a ComfyUI: start it on the CPU, load the pack, build models."""

import hashlib
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
import utils.extra_config  # noqa: F401  before `nodes`, which would hide it

spec = importlib.util.spec_from_file_location("custom_nodes.the/pack", Path(pack) / "__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)


def ours(name):
    """A module of the pack, under the foreign name that ComfyUI gives it."""
    return importlib.import_module(f"{spec.name}.{name}")


def refused(call):
    """The sentence with which a call is refused; empty where it is not."""
    try:
        call()
    except (ValueError, OSError, FloatingPointError) as problem:
        return str(problem)
    return ""


def build(folder):
    """A MODEL over a fresh model of ComfyUI's own classes, from a diffusers folder."""
    return ours("nodes.demo").load_model(Path(folder))


def with_lora(patcher, tensors, strength=1.0):
    """A clone with a LoRA as the stock loader puts it there, and how many of its modules found no weight."""
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map, log_missing=False)
    clone = patcher.clone()
    applied = clone.add_patches(patches, strength)
    return clone, sum(k.endswith(".alpha") for k in tensors) - len(applied)


def plain_sample(model, clip):
    """The stock KSampler on the embedded model, which nothing that ran before may change; latents (3,4,8,8)."""
    import nodes as stock

    positive, negative = (stock.CLIPTextEncode().encode(clip, text)[0] for text in ("a large red star, vivid", ""))
    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    return stock.KSampler().sample(model, 1, 6, 3.0, "euler", "normal", positive, negative, latent)[0]["samples"]


def digest(tensor):
    """Equal for tensors that are equal bit for bit."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
