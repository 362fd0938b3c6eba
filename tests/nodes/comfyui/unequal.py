"""Run inside a ComfyUI: patches that one of base and tuned model lacks or has otherwise, and patches that are the same.

Usage: unequal.py COMFYUI PACK. Prints one JSON line: what is said of each, nothing if it is taken.
"""

import json

import embedded  # noqa: F401  first: it puts ComfyUI on the path
import comfy.float
import comfy.lora
import comfy.patcher_extension
import torch
from embedded import refused
from layers import host, network, patcher, residency

results = {}


class Patch:
    """An object as a patch, with what it holds; ComfyUI copies it when it clones."""

    def __init__(self, weight):
        self.weight, self.maps = weight, {"a": torch.full((3,), weight)}

    def __call__(self, *args):
        return args[0]


def scaled_by(weight):
    def patch(args):
        return args["denoised"] * weight

    return patch


def differing(change_base, change_tuned):
    base = patcher(network())
    if change_base:
        change_base(base)
    tuned = base.clone() if change_base is change_tuned else patcher(base.model)
    if change_base is not change_tuned:
        change_tuned(tuned)
    return refused(lambda: residency.check_same_family(base, tuned))


wrap = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
changes = {
    "post-CFG": lambda m, w=1.0: m.set_model_sampler_post_cfg_function(scaled_by(w)),
    "pre-CFG": lambda m, w=1.0: m.set_model_sampler_pre_cfg_function(scaled_by(w)),
    "CFG": lambda m, w=1.0: m.set_model_sampler_cfg_function(scaled_by(w)),
    "unet wrapper": lambda m, w=1.0: m.set_model_unet_function_wrapper(scaled_by(w)),
    "mask": lambda m, w=1.0: m.set_model_denoise_mask_function(scaled_by(w)),
    "attention": lambda m, w=1.0: m.set_model_attn1_patch(Patch(w)),
    "replaced attention": lambda m, w=1.0: m.set_model_attn2_replace(Patch(w), "middle", 0),
    "wrapper": lambda m, w=1.0: m.add_wrapper_with_key(wrap, "k", scaled_by(w)),
}
results["refused"] = {name: differing(None, change) for name, change in changes.items()}
results["refused, of one kind"] = {name: differing(change, lambda m, c=change: c(m, 2.0)) for name, change in changes.items()}
results["taken, cloned"] = {name: differing(change, change) for name, change in changes.items()}
results["taken, set twice"] = {name: differing(change, lambda m, c=change: c(m)) for name, change in changes.items()}
rounding = comfy.float.stochastic_rounding
del comfy.float.stochastic_rounding
results["a symbol is missing"] = host.problem("switch models")
comfy.float.stochastic_rounding, calculate = rounding, comfy.lora.calculate_weight
comfy.lora.calculate_weight = lambda patches, weight: weight
results["a signature has changed"] = host.problem("switch models")
comfy.lora.calculate_weight = calculate
results["as it is"] = host.problem("switch models")
print(json.dumps(results))
