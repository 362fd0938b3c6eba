"""Run inside a ComfyUI: its own UNet, autoencoder and CLIP classes load the embedded model and give diffusers' outputs.

Usage: same_model.py COMFYUI PACK PIPELINE LORA. Prints one JSON line of errors. The pack is loaded under a foreign name,
as ComfyUI does, and never as `trainer`.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

comfy_path, pack, pipeline_folder, lora = sys.argv[1:5]
sys.path.insert(0, comfy_path)
sys.argv = sys.argv[:1]

import torch

torch.set_num_threads(1)
from comfy.cli_args import args

args.cpu = True
import comfy.diffusers_convert
import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
from safetensors.torch import load_file

spec = importlib.util.spec_from_file_location("custom_nodes.the/pack", Path(pack) / "__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
unet_policy = importlib.import_module(f"{spec.name}.trainer.policies.unet")
lora_file = importlib.import_module(f"{spec.name}.trainer.lora_file")
assert "trainer" not in sys.modules

policy = unet_policy.UNetPolicy.load(pipeline_folder)
errors = {}

state = policy.unet.state_dict()
config = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 128,
    "num_heads": 4, "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
    "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip


class Embedded(comfy.supported_models.SD15):
    unet_config = {}
    unet_extra_config = {}


model_config = Embedded(config)
model_config.set_inference_dtype(torch.float32, None)
model = model_config.get_model({}, "", device="cpu")
keys = comfy.utils.unet_to_diffusers(config)
renamed = {ours: state[theirs] for theirs, ours in keys.items() if theirs in state}
assert len(renamed) == len(state), "a UNet tensor has no ComfyUI name"
model.diffusion_model.load_state_dict(renamed)
patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

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

tensors = load_file(lora)
key_map = comfy.lora.model_lora_keys_unet(model, {})
patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), key_map, log_missing=False)
tuned = patcher.clone()
applied = tuned.add_patches(patches, 1.0)
errors["unmatched"] = sum(k.endswith(".alpha") for k in tensors) - len(applied)
tuned.patch_model()
lora_file.load_lora(policy, Path(lora))
with torch.no_grad():
    base, ours = ours, policy.denoiser(["a red star", "a blue ring"])(x, sigma)
    errors["tuned"] = float((tuned.model.apply_model(x, sigma, c_crossattn=cond) - ours).abs().max())
    errors["effect"] = float((ours - base).abs().max())
print(json.dumps(errors))
