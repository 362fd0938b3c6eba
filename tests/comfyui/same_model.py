"""Run inside a ComfyUI: its own UNet, autoencoder and CLIP classes load the embedded model and give diffusers' outputs.

Usage: same_model.py COMFYUI PACK PIPELINE LORA. Prints one JSON line of errors. The pack is loaded under a foreign name,
as ComfyUI does, and never as `trainer`.
"""

import json
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.diffusers_convert
import comfy.sd
import comfy.sd1_clip
import torch
from safetensors.torch import load_file

pipeline_folder, lora = embedded.arguments
policy = embedded.ours("trainer.policies.unet").UNetPolicy.load(pipeline_folder)
errors = {}
patcher = embedded.build(policy.unet.state_dict())
model = patcher.model

x, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), policy.embed(["a red star", "a blue ring"])
sigma = policy._table[torch.tensor([226, 701])].float()  # on the table: between its entries ComfyUI rounds, we interpolate
with torch.no_grad():
    ours = policy.denoiser(["a red star", "a blue ring"])(x, sigma)
    errors["denoised"] = float((model.apply_model(x, sigma, c_crossattn=cond) - ours).abs().max())

vae_state = comfy.diffusers_convert.convert_vae_state_dict(dict(policy.vae.state_dict()))
ddconfig = {
    "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 64, "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
vae = comfy.sd.VAE(sd=vae_state, config={"params": {"ddconfig": ddconfig, "embed_dim": 4}})
latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    pixels = vae.decode(latents / 0.18215).movedim(-1, 1)
    errors["decoded"] = float((pixels - policy.decode(latents)).abs().max())

tokenizer = comfy.sd1_clip.SDTokenizer(tokenizer_path=str(Path(pipeline_folder) / "tokenizer"), embedding_size=128)
end = len(policy.tokenizer) - 1
text_config = {
    "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "hidden_act": "quick_gelu",
    "max_position_embeddings": 77, "eos_token_id": end, "num_channels": 3,
}  # fmt: skip
clip = comfy.sd1_clip.SDClipModel(
    device="cpu", dtype=torch.float32, textmodel_json_config=text_config, special_tokens={"start": end - 1, "end": end, "pad": end}
)
text_state = {("" if k.startswith("text_model.") else "text_model.") + k: v for k, v in policy.text_encoder.state_dict().items()}
table = "text_model.embeddings.token_embedding.weight"
text_state[table] = torch.cat([text_state[table], torch.zeros(49408 - len(text_state[table]), 128)])
missing, unexpected = clip.transformer.load_state_dict(text_state, strict=False)
assert not unexpected and missing == ["text_projection.weight"], (missing, unexpected)
encoded = clip.encode_token_weights(tokenizer.tokenize_with_weights("a red star, blurred"))[0]
errors["text"] = float((encoded - policy.embed(["a red star, blurred"])).abs().max())

tuned, errors["unmatched"] = embedded.with_lora(patcher, load_file(lora))
tuned.patch_model()
embedded.ours("trainer.lora_file").load_lora(policy, Path(lora))
with torch.no_grad():
    base, ours = ours, policy.denoiser(["a red star", "a blue ring"])(x, sigma)
    errors["tuned"] = float((tuned.model.apply_model(x, sigma, c_crossattn=cond) - ours).abs().max())
    errors["effect"] = float((ours - base).abs().max())
print(json.dumps(errors))
