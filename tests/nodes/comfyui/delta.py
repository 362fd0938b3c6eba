"""Run inside a ComfyUI: a full fine-tune's differences by the stock loader and by ours, against the trainer's tuned model.

Usage: delta.py COMFYUI PACK PIPELINE DELTA. Prints one JSON line. Errors are RMS of the difference over RMS of the delta's effect.
"""

import json
import logging
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.lora
import comfy.sd
import torch
from compare import Case, error
from safetensors.torch import load_file

pipeline_folder, delta = embedded.arguments
policy = embedded.ours("trainer.models.unet").UNetPolicy.load(pipeline_folder)
embedded.ours("trainer.lora.file").load_lora(policy, Path(delta))
results, tensors = {}, load_file(delta)


class Unmatched(logging.Handler):
    """What ComfyUI's loader says of keys that it does not know."""

    def emit(self, record):
        results["unmatched"] += "lora key not loaded" in record.getMessage()


def rms(x):
    return float(x.double().square().mean().sqrt())


prompts = ["a red star", "a blue ring"]
x, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), policy.prompts.conditioning(prompts)["encoder_hidden_states"]
sigma = policy.levels[torch.tensor([226, 701])].float()
results["unmatched"] = 0
logging.getLogger().addHandler(Unmatched())
with torch.inference_mode():
    ours, before = policy.denoiser(prompts)(x, sigma), policy.denoiser(prompts, adapter="base")(x, sigma)
    base = embedded.build(pipeline_folder)
    stock, _ = comfy.sd.load_lora_for_models(base, None, dict(tensors), 1.0, 0.0)
    results["patched"] = sorted(stock.patches) == sorted(k for k in base.model.state_dict() if k.startswith("diffusion_model."))
    rng = torch.Generator().manual_seed(0)
    case = Case([[torch.randn(1, 77, 128, generator=rng), {}]], [[torch.randn(1, 77, 128, generator=rng), {}]])
    loaded, metadata = embedded.ours("nodes.lora").load(base, Path(delta), 1.0)
    results["switch"] = metadata.get("switch_sigma")
    apart = embedded.ours("nodes.lora").load(embedded.build(pipeline_folder), Path(delta), 1.0)[0]
    expected = case.truth(embedded.build(pipeline_folder), apart, "dpmpp_2m")
    for name, tuned in (("combined, stock loader", stock), ("combined", loaded)):
        results[name] = error(case.combined(base, tuned, "dpmpp_2m"), expected)
    results["effect on samples"] = error(expected, case.stock(base, "dpmpp_2m"))
    nothing = {k: torch.zeros_like(v) for k, v in tensors.items()}
    try:
        case.combined(base, comfy.sd.load_lora_for_models(base, None, nothing, 1.0, 0.0)[0], "euler")
    except ValueError as problem:
        results["refused"] = str(problem)
    alone, _ = comfy.sd.load_lora_for_models(embedded.build(pipeline_folder), None, dict(tensors), 1.0, 0.0)
    alone.patch_model()
    results["denoised"] = rms(alone.model.apply_model(x, sigma, c_crossattn=cond) - ours) / rms(ours - before)
    results["effect"] = rms(ours - before) / rms(before)
print(json.dumps(results))
