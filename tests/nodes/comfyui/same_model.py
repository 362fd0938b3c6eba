"""Run inside a ComfyUI: its own UNet, autoencoder and CLIP classes load the embedded model and give diffusers' outputs.

Usage: same_model.py COMFYUI PACK PIPELINE LORA. Prints one JSON line of errors. The pack is loaded under a foreign name,
as ComfyUI does, and never as `trainer`.
"""

import json
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import torch
from safetensors.torch import load_file

pipeline_folder, lora = embedded.arguments
policy = embedded.ours("trainer.models.unet").UNetPolicy.load(pipeline_folder)
errors = {}
demo = embedded.ours("nodes.demo")
patcher = embedded.build(pipeline_folder)
model = patcher.model

x, cond = (
    torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    policy.prompts.conditioning(["a red star", "a blue ring"])["encoder_hidden_states"],
)
sigma = policy.levels[torch.tensor([226, 701])].float()  # on the table: between its entries ComfyUI rounds, we interpolate
with torch.no_grad():
    ours = policy.denoiser(["a red star", "a blue ring"])(x, sigma)
    errors["denoised"] = float((model.apply_model(x, sigma, c_crossattn=cond) - ours).abs().max())

vae = demo.load_vae(Path(pipeline_folder))
latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    pixels = vae.decode(latents / 0.18215).movedim(-1, 1)
    errors["decoded"] = float((pixels - policy.decode(latents)).abs().max())

clip = demo.load_clip(Path(pipeline_folder))
encoded = clip.encode_from_tokens(clip.tokenize("a red star, blurred"))
errors["text"] = float((encoded - policy.prompts.conditioning(["a red star, blurred"])["encoder_hidden_states"]).abs().max())

tuned, errors["unmatched"] = embedded.with_lora(patcher, load_file(lora))
tuned.patch_model()
embedded.ours("trainer.lora.file").load_lora(policy, Path(lora))
with torch.no_grad():
    base, ours = ours, policy.denoiser(["a red star", "a blue ring"])(x, sigma)
    errors["tuned"] = float((tuned.model.apply_model(x, sigma, c_crossattn=cond) - ours).abs().max())
    errors["effect"] = float((ours - base).abs().max())
print(json.dumps(errors))
