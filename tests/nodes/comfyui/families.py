"""Run inside a ComfyUI: combined sampling on models of the SD1.5 and SD3 class from the stock loaders, and with a ControlNet.

Usage: families.py COMFYUI PACK. Prints one JSON line of relative RMS errors against two separate models.
"""

import json
from dataclasses import replace

import embedded  # first: it puts ComfyUI on the path
import nodes as stock
import tiny
import torch
from compare import SAMPLERS, Case, error, switch

results = {"space": {}}


def conditioning(seed, tokens, width, pooled=0):
    rng = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, pooled, generator=rng)} if pooled else {}
    return [[torch.randn(1, tokens, width, generator=rng), extra]]


def compare(name, build, case, targets, samplers=SAMPLERS):
    base = build(1)
    lora = tiny.random_lora(base, 5, targets)
    tuned, unmatched = embedded.with_lora(base, lora)
    results["space"][name] = type(base.get_model_object("model_sampling")).__mro__[1].__name__
    results[f"{name}, unmatched"], results[name], results[f"{name}, two"] = unmatched, {}, {}
    for sampler in samplers:
        expected = case.truth(build(1), embedded.with_lora(build(1), lora)[0], sampler)
        results[name][sampler] = error(case.combined(base, tuned, sampler), expected)
        results[f"{name}, two"][sampler] = error(case.combined(build(1), embedded.with_lora(build(1), lora)[0], sampler), expected)
    results[f"{name}, ends"] = [same for sampler in samplers[:3:2] for same in case.ends(base, tuned, sampler)]
    both = [replace(case, tuned_cfg=case.cfg).combined(base, tuned, "euler", at=at) for at in (0, case.steps)]
    results[f"{name}, effect"] = error(*both)


with torch.inference_mode():
    sd15 = Case(conditioning(0, 77, 768), conditioning(1, 77, 768))
    compare("sd15", tiny.sd15, sd15, ("to_q", "to_v", "to_out.0"))
    compare("sd3", tiny.sd3, Case(conditioning(2, 77, 4096, 2048), conditioning(3, 77, 4096, 2048), (2, 16, 8, 8)), ("to_q", "to_k"))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    guided = stock.ControlNetApplyAdvanced().apply_controlnet(sd15.positive, sd15.negative, tiny.control_net(6), hint, 1.0, 0.0, 1.0)
    controlled = replace(sd15, positive=guided[0], negative=guided[1])
    compare("control", tiny.sd15, controlled, ("to_q", "to_v", "to_out.0"), ("euler", "heun", "dpmpp_2m"))
    base = tiny.sd15(1)
    results["control matters"] = error(controlled.stock(base, "euler"), sd15.stock(base, "euler"))
    results["refused"] = {}
    for name, other in (("SD3", tiny.sd3(1)), ("embedded", embedded.ours("nodes.demo").load_model())):
        try:
            switch.switched(base, other, switch.Rule("step", 1))
        except ValueError as problem:
            results["refused"][name] = str(problem)
print(json.dumps(results))
