"""Run inside a ComfyUI: parts with schedules of their own, against chains of stock samplers over models that share nothing.

Usage: parts.py COMFYUI PACK PIPELINE LORA. Prints one JSON line of the largest differences.
"""

import json

import embedded  # first: it puts ComfyUI on the path
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import nodes as stock
import tiny
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from compare import error
from safetensors.torch import load_file

combined, parts = embedded.ours("nodes.combined"), embedded.ours("nodes.parts")
schedule = embedded.ours("nodes.schedule")
pipeline_folder, file = embedded.arguments
rng = torch.Generator().manual_seed(0)
positive, negative = ([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in range(2))
tensors = load_file(file)
SEED, CFG = 3, 4.0
shape = (2, 4, 8, 8)


def latent():
    return {"samples": torch.zeros(shape)}


def ours(base, tuned, mode, at, steps=8, sampler="euler", scheduler="normal", denoise=1.0, latent_image=None, tuned_cfg=CFG, **own):
    """The node's latent; guidance is one for both parts, so that a chain of stock samplers can be compared."""
    widgets = (base, tuned, mode, at, 1.0, SEED, steps, CFG, tuned_cfg, sampler, scheduler, positive, negative)
    output = combined.CombinedKSampler.execute(*widgets, latent_image or latent(), denoise, **own)
    return output.args[0]["samples"]


def stock_whole(model, steps, sampler, scheduler, denoise=1.0):
    return stock.KSampler().sample(model, SEED, steps, CFG, sampler, scheduler, positive, negative, latent(), denoise)[0]["samples"]


def levels(model, steps, scheduler):
    return comfy.samplers.KSampler(model, steps, torch.device("cpu"), "euler", scheduler, 1.0, {}).sigmas


def chain(first, then, sigmas, k, samplers):
    """Two stock custom samplers, the second on the first's latent with its leftover noise."""

    def run(model, part, noisy, given, name, seed):
        sampler = comfy.samplers.sampler_object(name)
        arguments = (model, noisy, seed, CFG, positive, negative, sampler, part, given)
        if hasattr(custom.SamplerCustom, "execute"):  # since 0.4
            return custom.SamplerCustom.execute(*arguments).args[0]
        return custom.SamplerCustom().sample(*arguments)[0]

    between = run(first, sigmas[: k + 1], True, latent(), samplers[0], SEED)
    return run(then, sigmas[k:], False, between, samplers[1], SEED + 1)["samples"]


results = {"errors": {}, "equal": {}, "refused": ""}
errors = results["errors"]
with torch.inference_mode():
    base = embedded.build(pipeline_folder)
    tuned = embedded.with_lora(base, tensors)[0]
    apart, merged = embedded.build(pipeline_folder), embedded.with_lora(embedded.build(pipeline_folder), tensors)[0]
    for sampler in ("euler", "dpmpp_2m", "heun", "euler_ancestral"):
        plain = ours(base, tuned, "step", 3, sampler=sampler)
        own = {"tuned_steps": 8, "tuned_sampler_name": sampler, "tuned_scheduler": "normal"}
        results["equal"][sampler] = bool(torch.equal(plain, ours(base, tuned, "step", 3, sampler=sampler, **own)))
    own = {"tuned_steps": 4, "tuned_sampler_name": "dpmpp_2m", "tuned_scheduler": "karras"}
    errors["tuned alone"] = error(ours(base, tuned, "step", 0, **own), stock_whole(merged, 4, "dpmpp_2m", "karras"))
    results["equal"]["base alone"] = bool(torch.equal(ours(base, tuned, "step", 8, **own), stock_whole(base, 8, "euler", "normal")))
    wide, short = levels(base, 8, "normal"), levels(base, 4, "karras")
    own = {"tuned_steps": 4, "tuned_scheduler": "karras"}
    for mode, at, level in (("step", 2, wide[2]), ("fraction", 0.5, wide[4]), ("last steps", 3, short[1])):
        sigmas = torch.cat([wide[wide > level * 1.0001], level[None], short[short < level / 1.0001]])
        k = int((wide > level * 1.0001).sum())
        errors[f"{mode}, one sampler"] = error(chain(apart, merged, sigmas, k, ("euler", "euler")), ours(base, tuned, mode, at, **own))
        for first, then in (("euler", "dpmpp_2m"), ("dpmpp_2m", "euler"), ("euler_ancestral", "dpmpp_2m_sde"), ("heun", "lcm")):
            found = ours(base, tuned, mode, at, sampler=first, **own, tuned_sampler_name=then)
            errors[f"{mode}, {first} and {then}"] = error(chain(apart, merged, sigmas, k, (first, then)), found)
    two = ours(base, merged, "step", 2, **own)
    errors["two checkpoints"] = error(two, ours(base, tuned, "step", 2, **own))
    errors["effect"] = error(ours(base, tuned, "step", 2, **own), ours(base, tuned, "step", 2))
    shape = (2, 16, 8, 8)
    positive, negative = ([[torch.randn(1, 77, 4096, generator=rng), {"pooled_output": torch.randn(1, 2048, generator=rng)}]] for _ in "ab")
    few = {"tuned_steps": 4, "tuned_scheduler": "simple"}
    low, high = (lambda model, shift=shift: ModelSamplingSD3().patch(model, shift)[0] for shift in (3.0, 6.0))
    base, lora = low(tiny.sd3(1)), tiny.random_lora(tiny.sd3(1), 5, ("to_q", "to_k"))
    wide, short = levels(base, 8, "normal"), levels(high(tiny.sd3(1)), 4, "simple")
    sigmas = torch.cat([wide[wide > short[1]], short[1:]])
    results["shifts"] = [float(short[1]), float(levels(base, 4, "simple")[1])]
    for name, tuned, alone in (
        ("two models", high(tiny.sd3(2)), high(tiny.sd3(2))),
        ("a LoRA", high(embedded.with_lora(base, lora)[0]), high(embedded.with_lora(tiny.sd3(1), lora)[0])),
    ):
        expected = chain(low(tiny.sd3(1)), alone, sigmas, len(sigmas) - 4, ("euler", "euler"))
        errors[f"{name} with a shift of its own"] = error(expected, ours(base, tuned, "last steps", 3, **few))
        expected = stock_whole(alone, 4, "euler", "simple")
        errors[f"{name} with a shift of its own, alone"] = error(expected, ours(base, tuned, "step", 0, **few))
    base, shape = embedded.build(pipeline_folder), (2, 4, 8, 8)
    positive, negative = ([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in "ab")
    tuned, own = embedded.with_lora(base, tensors)[0], {"tuned_steps": 4, "tuned_scheduler": "karras"}
    masked = {**latent(), "noise_mask": torch.ones(1, 8, 8)}
    try:
        ours(base, tuned, "step", 2, latent_image=masked, **own, tuned_sampler_name="dpmpp_2m")
    except ValueError as problem:
        results["refused"] = str(problem)
    ours(base, tuned, "step", 2, latent_image=masked, **own)
    results["nothing"] = bool(torch.equal(ours(base, tuned, "step", 2, denoise=0.0, **own), torch.zeros(shape)))
print(json.dumps(results))
