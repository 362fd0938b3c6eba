"""Run inside a ComfyUI by verify.py: its stock loader on a network in diffusers' layout, and on LoRA files.

Usage: in_comfyui.py COMFYUI compare|names FOLDER. The last line is JSON.
"""

import json
import sys
from pathlib import Path

comfy_path, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.path[:0] = [comfy_path, str(Path(__file__).resolve().parents[1] / "helpers")]
sys.argv = sys.argv[:1]

import torch
from comfy.cli_args import args

args.cpu = True
import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.sd
import comfy.utils
from native_names import native

torch.set_num_threads(1)
told = json.loads((folder / "told.json").read_text())


def rms(x):
    return float(x.double().square().mean().sqrt())


def names():
    """How many LoRA modules of a whole model have no weight in ComfyUI's key map; no memory is taken."""
    state = {k: torch.empty(shape, device="meta") for k, shape in told["shapes"].items()}
    converted = native(state)
    if converted is not None:
        config = comfy.model_detection.model_config_from_unet(converted, "")
    else:
        config = comfy.model_detection.model_config_from_diffusers_unet(state)
    config.set_inference_dtype(torch.bfloat16, torch.float32)
    with torch.device("meta"):
        model = config.get_model(converted or {}, "", device="meta")
    known = comfy.lora.model_lora_keys_unet(model, {})
    stems = [k.removesuffix(".lora_down.weight").removesuffix(".lora_A.weight") for k in told["keys"]]
    return {"unmatched": sum(stem not in known for stem in stems)}


def shorten(network):
    """Take Chroma's last modulation behind those of its blocks: ComfyUI takes it from the end of a table for 19 and 38 blocks."""
    own, last = network.get_modulations, 3 * network.params.depth_single_blocks + 12 * network.params.depth

    def modulations(table, kind, idx=0):
        return table[:, last : last + 2].split(1, dim=1) if kind == "final" else own(table, kind, idx=idx)

    network.get_modulations = modulations


def compare():
    """Each LoRA by the stock loader: modules that found no weight, and the denoised output against the trainer's."""
    from safetensors.torch import load_file

    ours = load_file(folder / "outputs.safetensors")
    state = load_file(folder / "network.safetensors")
    patcher = comfy.sd.load_diffusion_model_state_dict(native(state) or state, {"dtype": torch.bfloat16})
    model = patcher.model
    cond = {k.removeprefix("cond."): v for k, v in ours.items() if k.startswith("cond.")}
    extra = {}
    pooled = cond.get("pooled_projections")
    if "text_embeds" in cond:
        size = {k: told["size"] for k in ("width", "height", "target_width", "target_height")}
        extra["y"] = model.encode_adm(pooled_output=cond["text_embeds"], **size)
    elif pooled is not None:
        extra["y"] = pooled
    if type(model).__name__ == "Chroma":
        extra["guidance"] = torch.zeros(len(ours["x"]))
        shorten(model.diffusion_model)
    if type(model).__name__ == "Flux":
        extra["guidance"] = torch.full((len(ours["x"]),), told["guidance"])

    joined = cond["encoder_hidden_states"].flatten(2)  # Krea 2's are several layers
    texts = [(slice(None), joined)]
    hidden = "mask" in cond and type(model).__name__ != "Anima"  # whose zeros behind a prompt are seen
    if hidden:  # without padding, and so each prompt by itself
        lengths = [int(row.sum()) for row in cond["mask"]]
        texts = [(slice(i, i + 1), joined[i : i + 1, :n]) for i, n in enumerate(lengths)]
    more = {"num_tokens": 1} if hidden else {}

    frames = getattr(model.latent_format, "latent_dimensions", 2) == 3
    states = ours["x"].unsqueeze(2) if frames else ours["x"]

    def denoised(patcher):
        patcher.patch_model(lowvram_model_memory=1)  # LoRAs are added to float32 weights as each module runs, not rounded into bfloat16
        with torch.no_grad():
            parts = [
                patcher.model.apply_model(
                    states[rows], ours["sigma"][rows], c_crossattn=text, **{k: v[rows] for k, v in extra.items()}, **more
                )
                for rows, text in texts
            ]
            result = torch.cat(parts)
        patcher.unpatch_model()
        return (result.squeeze(2) if frames else result).float()

    result = {"class": type(model).__name__, "base_off": rms(denoised(patcher) - ours["base"]) / rms(ours["base"])}
    for name in told["objectives"]:
        tensors = comfy.utils.load_torch_file(str(folder / f"{told['name']}-{name}.safetensors"))
        known = comfy.lora.model_lora_keys_unet(model, {})
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), known, log_missing=True)
        clone = patcher.clone()
        applied = clone.add_patches(patches, 1.0)
        modules = sum(k.endswith((".lora_down.weight", ".lora_A.weight")) for k in tensors)
        tuned = denoised(clone)
        result[name] = {"unmatched": modules - len(applied), "off": rms(tuned - ours[name]) / rms(ours[name] - ours["base"])}
    return result


print(json.dumps(names() if what == "names" else compare()))
