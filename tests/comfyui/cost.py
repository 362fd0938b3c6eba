"""What combined sampling costs: pairs in one run on a UNet of the SD1.5 class at 64×64 latents, one CPU thread.

Usage: cost.py COMFYUI PACK [true]. With `true` the UNet has SD1.5's real configuration (860 M random weights, once, few steps).
Prints one JSON line. Calls of the model are equal: tuned_cfg = cfg, so that every step evaluates both prompts.
"""

import json
import statistics
import sys
import time

import embedded  # first: it puts ComfyUI on the path
import nodes as stock
import tiny
import torch
from compare import Case

real = embedded.arguments[:1] == ["true"]
if real:
    tiny.SD15.update(num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0])
    tiny.OUTER.update(transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1)
draws = torch.Generator().manual_seed(0)
prompt = [[torch.randn(1, 77, 768, generator=draws), {}]]
case = Case(prompt, [[-prompt[0][0], {}]], (1, 4, 64, 64), steps=2, k=1, tuned_cfg=4.0)


def chained(base, tuned):
    """Two KSamplerAdvanced, the way without this pack."""
    node, common = stock.KSamplerAdvanced(), (3, case.steps, case.cfg, "euler", "normal", case.positive, case.negative)
    first = node.sample(base, "enable", *common, case.latent(), 0, case.k, "enable")[0]
    return node.sample(tuned, "disable", *common, first, case.k, 10000, "disable")[0]


def seconds(action):
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


with torch.inference_mode():
    base = tiny.sd15(1)
    lora = tiny.random_lora(base, 5, ("to_q", "to_k", "to_v", "to_out.0"))
    tuned, _ = embedded.with_lora(base, lora)
    calls = []
    base.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    ways = {
        "plain": lambda: case.stock(base, "euler"),
        "combined": lambda: case.combined(base, tuned, "euler"),
        "chained": lambda: chained(base, tuned),
    }
    counted, times = {}, {name: [] for name in ways}
    for name, way in ways.items():
        calls.clear()
        way()
        counted[name] = len(calls)
    for _ in range(1 if real else 3):
        for name, way in ways.items():
            times[name].append(seconds(way))
    ratios = {n: statistics.median(a / b for a, b in zip(times["combined"], times[n])) for n in ("plain", "chained")}
    lora_bytes = sum(v.nbytes for k, v in lora.items() if not k.endswith(".alpha"))
    print(json.dumps({
        "model calls": counted, "seconds, plain": statistics.median(times["plain"]), "combined / plain": ratios["plain"],
        "combined / chained": ratios["chained"], "LoRA MB": lora_bytes / 1e6,
        "model MB": sum(p.nbytes for p in base.model.parameters()) / 1e6,
    }), file=sys.stdout)  # fmt: skip
