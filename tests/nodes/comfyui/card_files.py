"""Run inside a ComfyUI: a small checkpoint of SD1.5's class in several storages, and a LoRA of it, for `card.py`.

Usage: card_files.py COMFYUI PACK FOLDER. Prints one JSON line.
"""

import json
from pathlib import Path

import tiny  # first: it puts ComfyUI on the path
import torch
from safetensors.torch import save_file

folder = Path(tiny.embedded.arguments[0])
for kind in ("checkpoints", "diffusion_models", "loras"):
    (folder / kind).mkdir(parents=True, exist_ok=True)
tiny.write_checkpoint(folder / "checkpoints" / "tiny.safetensors", 1)
types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
state = tiny.unet_state(1)
for name, dtype in types.items():
    stored = {key: value.to(dtype if name != "fp8" or value.ndim == 2 else torch.float16).contiguous() for key, value in state.items()}
    save_file(stored, folder / "diffusion_models" / f"{name}.safetensors")
targets = ("to_q", "to_k", "to_v", "to_out.0")
save_file(tiny.random_lora(tiny.sd15(1), 2, targets), folder / "loras" / "tiny.safetensors")
print(json.dumps(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))))
