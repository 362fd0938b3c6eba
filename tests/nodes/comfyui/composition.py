"""Run inside a ComfyUI: a switched model in the stock nodes that people put around a sampler, against the stock models at both ends.

Usage: composition.py COMFYUI PACK LORA. Prints one JSON line: for each way, whether k = 0 is the tuned model and k = T the base bit for
bit, and whether what is in between is finite and neither of them.
"""

import json

import embedded  # first: it puts ComfyUI on the path
import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import nodes as stock
import torch
from safetensors.torch import load_file

switch, demo = (embedded.ours(f"nodes.{name}") for name in ("switch", "demo"))
rng = torch.Generator().manual_seed(0)
positive, other, negative = ([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in range(3))
STEPS = 6


def given(latent=None):
    return latent or {"samples": torch.zeros(2, 4, 8, 8)}


def ksampler(model, latent=None, denoise=1.0, conds=(positive, negative), sampler="dpmpp_2m", steps=STEPS):
    return stock.KSampler().sample(model, 3, steps, 3.0, sampler, "normal", *conds, given(latent), denoise)[0]


def advanced(model, latent, first, end, noise, leftover, sampler="euler"):
    settings = (noise, 3, STEPS, 3.0, sampler, "normal", positive, negative, given(latent), first, end, leftover)
    return stock.KSamplerAdvanced().sample(model, *settings)[0]


def area(model):
    both = stock.ConditioningSetArea().append(other, 32, 64, 0, 0, 1.0)[0]
    return ksampler(model, conds=(stock.ConditioningCombine().combine(positive, both)[0], negative))


def masked_regions(model):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    left = stock.ConditioningSetMask().append(positive, mask, "default", 1.0)[0]
    right = stock.ConditioningSetMask().append(other, 1 - mask, "default", 1.0)[0]
    return ksampler(model, conds=(stock.ConditioningCombine().combine(left, right)[0], negative))


def ranges(model):
    early = stock.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)[0]
    late = stock.ConditioningSetTimestepRange().set_range(other, 0.5, 1.0)[0]
    return ksampler(model, conds=(stock.ConditioningCombine().combine(early, late)[0], negative))


def image_to_image(model):
    return ksampler(model, {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))}, denoise=0.5)


def inpainting(model):
    latent = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))}
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    return ksampler(model, stock.SetLatentNoiseMask().set_mask(latent, mask)[0])


def second_pass(model):
    large = stock.LatentUpscaleBy().upscale(ksampler(model), "bislerp", 1.5)[0]
    return ksampler(model, large, denoise=0.5)


def start_and_end(model):
    return advanced(model, None, 1, 4, "enable", "enable")


def leftover(model):
    return advanced(model, advanced(base, None, 0, 2, "enable", "enable"), 2, 10000, "disable", "disable")


def control(model):
    return ksampler(model, conds=stock.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, hint, 0.8, 0.0, 1.0))


def tiny_control_net():
    """ComfyUI's own ControlNet of the embedded UNet's size, with weights that do something."""
    outer = {"out_channels", "transformer_depth_output", "dtype"}  # of a UNet alone
    config = {name: value for name, value in base.model.model_config.unet_config.items() if name not in outer}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.manual_cast, device="cpu", dtype=torch.float32)
    weights = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=weights)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)


def attention(model):
    """As IP-Adapter does: what every cross-attention gives is changed."""
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda out, extra: 0.9 * out)
    return patched


WAYS = {
    "regional prompts, area": area, "regional prompts, mask": masked_regions, "prompts in ranges of steps": ranges,
    "image to image": image_to_image, "inpainting": inpainting, "second pass": second_pass,
    "advanced sampler, start and end": start_and_end, "advanced sampler, leftover noise": leftover, "ControlNet": control,
}  # fmt: skip
results = {}
with torch.inference_mode():
    base = demo.load_model()
    tuned, _ = embedded.with_lora(base, load_file(embedded.arguments[0]))
    torch.manual_seed(0)
    net = tiny_control_net()
    hint = torch.rand(1, 64, 64, 3)
    ways = {name: (way, base, tuned) for name, way in WAYS.items()}
    before = attention(base)
    ways["attention patched on both"] = (ksampler, before, embedded.with_lora(before, load_file(embedded.arguments[0]))[0])
    for name, (way, a, b) in ways.items():
        ends = []
        for k, alone in ((0.0, b), (1.0, a)):
            ends.append(bool(torch.equal(way(switch.switched(a, b, switch.Rule("fraction", k)))["samples"], way(alone)["samples"])))
        middle, first, last = (way(m)["samples"] for m in (switch.switched(a, b, switch.Rule("fraction", 0.5)), a, b))
        apart = min(float((middle - one).abs().max()) for one in (first, last))
        results[name] = [*ends, bool(middle.isfinite().all()), apart, float((first - last).abs().max())]
    results["ControlNet acts"] = float((control(base)["samples"] - ksampler(base)["samples"]).abs().max())
print(json.dumps(results))
