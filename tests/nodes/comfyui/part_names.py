"""Run inside a ComfyUI: names and shapes of its own text encoders and autoencoders at their true sizes, without memory.

Usage: part_names.py COMFYUI PACK. Prints one JSON line: by model and part, shapes by name as its files have them.
"""

import json
from pathlib import Path

import embedded
import comfy.ldm.wan.vae
import comfy.ops
import comfy.text_encoders.llama as llama
import comfy.text_encoders.t5
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine

FLUX = {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
FLUX |= {"attn_resolutions": [], "dropout": 0.0, "z_channels": 16}


def text_encoder(kind, config=None):
    return kind(config or {}, torch.float32, "meta", comfy.ops.manual_cast)


def flux_vae():
    sides = {
        f"{side.lower()}_config": {"target": f"comfy.ldm.modules.diffusionmodules.model.{side}", "params": FLUX}
        for side in ("Encoder", "Decoder")
    }
    return AutoencodingEngine(regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}, **sides)


def on_disk(name):
    """A name of Qwen3-VL as its files have it; ComfyUI renames it when it loads."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


with torch.device("meta"):
    wan = comfy.ldm.wan.vae.WanVAE(96, 16, [1, 2, 4, 4], 2, [], [False, True, True], dropout=0.0)
    ae, ae2 = flux_vae(), AutoencoderKL(ddconfig={**FLUX, "z_channels": 32, "batch_norm_latent": True}, embed_dim=32)
t5 = json.loads((Path(embedded.comfy_path) / "comfy" / "text_encoders" / "t5_config_xxl.json").read_text())
four = text_encoder(llama.Qwen3_4B)
parts = {"z-image": (four, ae), "flux2-klein-4b": (four, ae2), "flux2-klein-9b": (text_encoder(llama.Qwen3_8B), ae2)}
parts |= {"qwen-image": (text_encoder(llama.Qwen25_7BVLI), wan), "chroma": (text_encoder(comfy.text_encoders.t5.T5, t5), ae)}
parts["anima"] = (text_encoder(llama.Qwen3_06B), wan)
found = {
    f"{model} {part}": {key: list(value.shape) for key, value in module.state_dict().items()}
    for model, modules in parts.items()
    for part, module in zip(("text_encoder", "vae"), modules)
}
import comfy.text_encoders.qwen3vl as qwen3vl

vision = text_encoder(qwen3vl._make_qwen3vl_model("qwen3vl_4b")).state_dict()
found["krea2 text_encoder"] = {on_disk(key): list(value.shape) for key, value in vision.items()}
print(json.dumps(found))
