"""Run inside a ComfyUI: the combined sampler against a guider over two separate models, and against the stock KSampler.

Usage: exactness.py COMFYUI PACK PIPELINE LORA STYLE_LORA. Prints one JSON line of relative RMS errors and equalities.
"""

import asyncio
import json
from dataclasses import replace

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler
import nodes as stock
import torch
from compare import SAMPLERS, Case, combined, error, switch
from safetensors.torch import load_file

two = embedded.ours("nodes.guider")
pipeline_folder, lora, style_lora = embedded.arguments
rng = torch.Generator().manual_seed(0)
positive = [[torch.randn(1, 77, 128, generator=rng), {}]]
negative = [[torch.randn(1, 77, 128, generator=rng), {}]]
case = Case(positive, negative)
RULE, STEPS, K, CFG, TUNED_CFG = switch.Rule("step", 1), case.steps, case.k, case.cfg, case.tuned_cfg


results = {"shared": {}, "two": {}, "styled": {}}
with torch.inference_mode():
    reward, style = load_file(lora), load_file(style_lora)
    base = embedded.build(pipeline_folder)
    tuned, _ = embedded.with_lora(base, reward)
    plain = case.stock(base, "euler")
    for sampler in SAMPLERS:
        expected = case.truth(embedded.build(pipeline_folder), embedded.with_lora(embedded.build(pipeline_folder), reward)[0], sampler)
        results["shared"][sampler] = error(case.combined(base, tuned, sampler), expected)
        other = embedded.with_lora(embedded.build(pipeline_folder), reward)[0]
        results["two"][sampler] = error(case.combined(embedded.build(pipeline_folder), other, sampler), expected)
    styled_base, _ = embedded.with_lora(base, style)
    styled_tuned, _ = embedded.with_lora(styled_base, reward)
    for sampler in SAMPLERS:
        apart = embedded.with_lora(embedded.build(pipeline_folder), style)[0]
        expected = case.truth(apart, embedded.with_lora(embedded.with_lora(embedded.build(pipeline_folder), style)[0], reward)[0], sampler)
        results["styled"][sampler] = error(case.combined(styled_base, styled_tuned, sampler), expected)
    for sampler in ("euler", "dpmpp_2m"):
        results[f"ends {sampler}"] = all(case.ends(base, tuned, sampler))
    through_stock = case.stock(switch.BaseTunedSwitch.execute(base, tuned, "step", K, 1.0).result[0], "dpmpp_2m")
    results["stock sampler"] = error(through_stock, replace(case, tuned_cfg=CFG).combined(base, tuned, "dpmpp_2m"))
    results["base untouched"] = bool(torch.equal(case.stock(base, "euler"), plain))
    results["effect"] = error(replace(case, tuned_cfg=CFG).combined(base, tuned, "euler", at=0), plain)
    recommended = float(comfy.samplers.KSampler(base, STEPS, torch.device("cpu"), "euler", "normal", 1.0, {}).sigmas[K])
    told = tuned.clone()
    told.set_attachments(switch.ATTACHMENT, {"switch_sigma": recommended})
    automatic = case.combined(base, told, "euler", mode="auto")
    results["auto"] = bool(torch.equal(automatic, case.combined(base, tuned, "euler")))
    others = {"tuned_positive": negative, "tuned_negative": positive}
    swapped = case.combined(base, tuned, "euler", at=0, **others)
    with_swapped = stock.KSampler().sample(tuned, 3, STEPS, TUNED_CFG, "euler", "normal", negative, positive, case.latent())[0]["samples"]
    results["own conditioning"] = bool(torch.equal(swapped, with_swapped))
    made = combined.CombinedGuiderNode.execute(base, tuned, "step", K, 1.0, CFG, TUNED_CFG, positive, negative).result[0]
    noise = comfy_extras.nodes_custom_sampler.Noise_RandomNoise(3)
    chosen = comfy.samplers.sampler_object("dpmpp_2m")
    levels = comfy.samplers.KSampler(base, STEPS, torch.device("cpu"), "dpmpp_2m", "normal", 1.0, {}).sigmas
    advanced = comfy_extras.nodes_custom_sampler.SamplerCustomAdvanced
    guided = getattr(advanced, "execute", None) or advanced().sample
    guided = guided(noise, made, chosen, levels, case.latent())
    guided = (guided.result if hasattr(guided, "result") else guided)[0]["samples"]
    results["guider"] = bool(torch.equal(guided, case.combined(base, tuned, "dpmpp_2m")))
    for name, second, settings in (("combined", tuned, {"switch": str(K)}), ("rl", tuned, {"weight": 0.0}), ("npo", None, {})):
        mixed = two.guider(base, second, two.guide_of(name, tuned, settings), CFG, TUNED_CFG, positive, negative, None)
        start = case.latent()["samples"]
        alike = mixed.sample(comfy.sample.prepare_noise(start, 3), start, chosen, levels, disable_pbar=True, seed=3)
        expected = case.combined(base, tuned, "dpmpp_2m") if name == "combined" else case.stock(base, "dpmpp_2m")
        results[f"guide {name}"] = bool(torch.equal(alike, expected))
    half = switch.BaseTunedSwitch.execute(base, tuned, "step", 0, 0.5).result[0]
    results["strength"] = error(case.stock(half, "euler"), case.stock(embedded.with_lora(base, reward, 0.5)[0], "euler"))
    results["denoise"] = bool(torch.isfinite(replace(case, steps=4).combined(base, tuned, "euler", at=2, denoise=0.5)).all())

    masked = {**case.latent(), "samples": torch.randn(2, 4, 8, 8, generator=rng), "noise_mask": torch.eye(8)[None, None]}
    with_mask = stock.KSampler().sample(base, 3, STEPS, CFG, "dpmpp_2m", "normal", positive, negative, masked, 0.5)[0]["samples"]
    ours = case.combined(base, tuned, "dpmpp_2m", at=STEPS, latent=masked, denoise=0.5)
    results["mask"] = bool(torch.equal(ours, with_mask)) and not torch.equal(with_mask, case.stock(base, "dpmpp_2m"))

    def loads(action):
        """How often ComfyUI loads a model's weights while something runs."""
        real, seen = comfy.model_patcher.ModelPatcher.load, []
        comfy.model_patcher.ModelPatcher.load = lambda self, *a, **k: (seen.append(1), real(self, *a, **k))[1]
        try:
            action()
        finally:
            comfy.model_patcher.ModelPatcher.load = real
        return len(seen)

    same, drawn = replace(case, tuned_cfg=CFG), []
    weak = embedded.with_lora(base, reward, 0.5)[0]
    results["loads"] = [loads(lambda m=m: drawn.append(same.combined(base, m, "euler", at=0))) for m in (tuned, tuned, weak)]
    truth = [case.stock(m, "euler") for m in (tuned, tuned, weak)]
    results["right after each load"] = all(map(torch.equal, drawn, truth)) and not torch.equal(drawn[0], drawn[2])

    def stopped(name, kind):
        """Stop a run in the tuned part; then the base must be as before, through the same nodes."""

        def stop(_module, _inputs):
            seen.append(1)
            if len(seen) == K + 2:
                raise kind

        seen = []
        hook = base.model.diffusion_model.register_forward_pre_hook(stop)
        try:
            case.combined(base, tuned, "euler")
            results[name] = False
        except kind:
            results[name] = len(seen) == K + 2
        hook.remove()
        results[name] = results[name] and bool(torch.equal(case.stock(base, "euler"), plain))

    stopped("untouched by Cancel", comfy.model_management.InterruptProcessingException)
    stopped("untouched by a failure", RuntimeError)

    calls = []
    base.model.diffusion_model.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    replace(case, tuned_cfg=1.0).combined(base, tuned, "euler")
    results["evaluations"] = calls
    silent, _ = embedded.with_lora(base, {k: torch.zeros_like(v) if "lora_up" in k else v for k, v in reward.items()})
    faint, _ = embedded.with_lora(base, reward, 0.0)
    patched = embedded.build(pipeline_folder)
    patched.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    outside = tuned.clone()
    outside.add_patches({"model_sampling.sigmas": (torch.ones_like(base.model.model_sampling.sigmas),)})
    once = switch.switched(base, tuned, RULE)
    results["refused"] = {
        "beyond": embedded.refused(lambda: case.combined(base, tuned, "euler", at=STEPS + 1)),
        "equal": embedded.refused(lambda: switch.switched(base, base.clone(), RULE)),
        "auto": embedded.refused(lambda: switch.BaseTunedSwitch.execute(base, tuned, "auto", 0.0, 1.0)),
        "beyond, stock sampler": embedded.refused(
            lambda: case.stock(switch.switched(base, tuned, switch.Rule("step", STEPS + 1)), "euler")
        ),
        "zero weights": embedded.refused(lambda: switch.switched(base, silent, RULE)),
        "zero strength": embedded.refused(lambda: switch.switched(base, faint, RULE)),
        "not in a module": embedded.refused(lambda: switch.switched(base, outside, RULE)),
        "switch as base": embedded.refused(lambda: switch.switched(once, tuned, RULE)),
        "switch as tuned": embedded.refused(lambda: switch.switched(base, once, RULE)),
        "attention patches": embedded.refused(lambda: switch.switched(base, patched, RULE)),
        "empty": embedded.refused(lambda: case.combined(base, tuned, "euler", latent={"samples": torch.zeros(0, 4, 8, 8)})),
        "not finite": embedded.refused(
            lambda: case.combined(base, tuned, "euler", latent={"samples": torch.full((1, 4, 8, 8), float("nan"))})
        ),
    }

    flow = base.clone()
    flow.add_object_patch(
        "model_sampling", type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    )
    results["refused"]["flow"] = embedded.refused(lambda: switch.switched(base, flow, RULE))
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
