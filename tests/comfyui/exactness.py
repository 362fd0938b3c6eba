"""Run inside a ComfyUI: the combined sampler against a guider over two separate models, and against the stock KSampler.

Usage: exactness.py COMFYUI PACK PIPELINE LORA STYLE_LORA. Prints one JSON line of relative RMS errors and equalities.
"""

import asyncio
import json

import embedded  # first: it puts ComfyUI on the path
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler
import nodes as stock
import torch
from safetensors.torch import load_file

pipeline_folder, lora, style_lora = embedded.arguments
switch = embedded.ours("nodes.switch")
draws = torch.Generator().manual_seed(0)
positive = [[torch.randn(1, 77, 128, generator=draws), {}]]
negative = [[torch.randn(1, 77, 128, generator=draws), {}]]
STEPS, K, CFG, TUNED_CFG = 8, 5, 4.0, 1.5
RULE = switch.Rule("step", 1)


def latent():
    return {"samples": torch.zeros(2, 4, 8, 8)}


class TwoModels(comfy.samplers.CFGGuider):
    """The truth: two models that share nothing, routed by the rule, plainly."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        tuned = float(timestep.max()) <= float(sigmas[K]) * (1 + 1e-4)
        model = self.second if tuned else self.inner_model
        return comfy.samplers.sampling_function(
            model, x, timestep, self.conds["negative"], self.conds["positive"], TUNED_CFG if tuned else CFG, model_options, seed
        )


def truth(base, tuned, sampler):
    tuned.patch_model()
    tuned.pre_run()
    plan = comfy.samplers.KSampler(base, STEPS, torch.device("cpu"), sampler, "normal", 1.0, {})
    guider = TwoModels(base)
    guider.set_conds(positive, negative)
    guider.second = tuned.model
    start = latent()["samples"]
    noise = comfy.sample.prepare_noise(start, 3)
    return guider.sample(noise, start, comfy.samplers.sampler_object(sampler), plan.sigmas, disable_pbar=True, seed=3)


def combined(base, tuned, sampler, at=K, cfg=CFG, tuned_cfg=TUNED_CFG, steps=STEPS, denoise=1.0, mode="step", **conds):
    node, prompts = switch.CombinedKSampler, (positive, negative)
    out = node.execute(base, tuned, mode, at, 1.0, 3, steps, cfg, tuned_cfg, sampler, "normal", *prompts, latent(), denoise, **conds)
    return out.result[0]["samples"]


def stock_sample(model, sampler, steps=STEPS):
    return stock.KSampler().sample(model, 3, steps, CFG, sampler, "normal", positive, negative, latent())[0]["samples"]


def error(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def refused(call):
    try:
        call()
    except ValueError as problem:
        return str(problem)
    return ""


results = {"shared": {}, "two": {}, "styled": {}}
with torch.inference_mode():
    reward, style = load_file(lora), load_file(style_lora)
    base = embedded.build(pipeline_folder)
    tuned, _ = embedded.with_lora(base, reward)
    plain = stock_sample(base, "euler")
    for sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp", "dpm_2"):
        expected = truth(embedded.build(pipeline_folder), embedded.with_lora(embedded.build(pipeline_folder), reward)[0], sampler)
        results["shared"][sampler] = error(combined(base, tuned, sampler), expected)
        other = embedded.with_lora(embedded.build(pipeline_folder), reward)[0]
        results["two"][sampler] = error(combined(embedded.build(pipeline_folder), other, sampler), expected)
    styled_base, _ = embedded.with_lora(base, style)
    styled_tuned, _ = embedded.with_lora(styled_base, reward)
    for sampler in ("euler", "dpmpp_2m"):
        apart = embedded.with_lora(embedded.build(pipeline_folder), style)[0]
        expected = truth(apart, embedded.with_lora(embedded.with_lora(embedded.build(pipeline_folder), style)[0], reward)[0], sampler)
        results["styled"][sampler] = error(combined(styled_base, styled_tuned, sampler), expected)
    for name, sampler in (("euler", "euler"), ("dpmpp_2m", "dpmpp_2m")):
        same = [
            torch.equal(combined(base, tuned, sampler, at=0, tuned_cfg=CFG), stock_sample(tuned, sampler)),
            torch.equal(combined(base, tuned, sampler, at=STEPS), stock_sample(base, sampler)),
        ]
        results[f"ends {name}"] = all(same)
    through_stock = stock_sample(switch.BaseTunedSwitch.execute(base, tuned, "step", K, 1.0).result[0], "dpmpp_2m")
    results["stock sampler"] = error(through_stock, combined(base, tuned, "dpmpp_2m", tuned_cfg=CFG))
    results["base untouched"] = bool(torch.equal(stock_sample(base, "euler"), plain))
    results["effect"] = error(combined(base, tuned, "euler", at=0, tuned_cfg=CFG), plain)
    recommended = float(comfy.samplers.KSampler(base, STEPS, torch.device("cpu"), "euler", "normal", 1.0, {}).sigmas[K])
    told = tuned.clone()
    told.set_attachments(switch.ATTACHMENT, {"switch_sigma": recommended})
    automatic = combined(base, told, "euler", mode="auto")
    results["auto"] = bool(torch.equal(automatic, combined(base, tuned, "euler")))
    others = {"tuned_positive": negative, "tuned_negative": positive}
    swapped = combined(base, tuned, "euler", at=0, **others)
    with_swapped = stock.KSampler().sample(tuned, 3, STEPS, TUNED_CFG, "euler", "normal", negative, positive, latent())[0]["samples"]
    results["own conditioning"] = bool(torch.equal(swapped, with_swapped))
    made = switch.CombinedGuiderNode.execute(base, tuned, "step", K, 1.0, CFG, TUNED_CFG, positive, negative).result[0]
    noise = comfy_extras.nodes_custom_sampler.Noise_RandomNoise(3)
    chosen = comfy.samplers.sampler_object("dpmpp_2m")
    levels = comfy.samplers.KSampler(base, STEPS, torch.device("cpu"), "dpmpp_2m", "normal", 1.0, {}).sigmas
    advanced = comfy_extras.nodes_custom_sampler.SamplerCustomAdvanced
    guided = getattr(advanced, "execute", None) or advanced().sample
    guided = guided(noise, made, chosen, levels, latent())
    guided = (guided.result if hasattr(guided, "result") else guided)[0]["samples"]
    results["guider"] = bool(torch.equal(guided, combined(base, tuned, "dpmpp_2m")))
    half = switch.BaseTunedSwitch.execute(base, tuned, "step", 0, 0.5).result[0]
    results["strength"] = error(stock_sample(half, "euler"), stock_sample(embedded.with_lora(base, reward, 0.5)[0], "euler"))
    results["denoise"] = bool(torch.isfinite(combined(base, tuned, "euler", at=2, steps=4, denoise=0.5)).all())

    calls = []
    base.model.diffusion_model.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    combined(base, tuned, "euler", tuned_cfg=1.0)
    results["evaluations"] = calls
    results["refused"] = {
        "beyond": refused(lambda: combined(base, tuned, "euler", at=STEPS + 1)),
        "equal": refused(lambda: switch.switched(base, base.clone(), RULE)),
        "auto": refused(lambda: switch.BaseTunedSwitch.execute(base, tuned, "auto", 0.0, 1.0)),
        "reversed": refused(lambda: switch.switched(tuned, base, RULE)),
        "not finite": refused(
            lambda: switch.CombinedKSampler.execute(
                base, tuned, "step", 1, 1.0, 0, 2, 1.0, 1.0, "euler", "normal", positive, negative,
                {"samples": torch.full((1, 4, 8, 8), float("nan"))}, 1.0,
            )
        ),
    }  # fmt: skip

    flow = base.clone()
    flow.add_object_patch(
        "model_sampling", type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    )
    results["refused"]["flow"] = refused(lambda: switch.switched(base, flow, RULE))
    asyncio.run(stock.load_custom_node(embedded.pack))
    results["registered"] = sorted(name for name in stock.NODE_CLASS_MAPPINGS if name.startswith("ImageReFL"))
    texts = []
    for name in results["registered"]:
        node = stock.NODE_CLASS_MAPPINGS[name]
        groups = node.INPUT_TYPES()
        texts += [options.get("tooltip") for group in ("required", "optional") for _, options in groups.get(group, {}).values()]
        texts += [*(getattr(node, "OUTPUT_TOOLTIPS", None) or []), node.DESCRIPTION]
    results["described"] = all(texts) and len(texts) > 100
print(json.dumps(results))
