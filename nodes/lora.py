"""Loading a reward LoRA together with what its file says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths
from comfy_api.latest import io

from ..trainer.demo import files
from ..trainer.lora.file import read_lora
from ..trainer.lora.names import is_delta
from .sockets import CATEGORY, schema
from .switch import ATTACHMENT


def names() -> list[str]:
    """The embedded model's own LoRAs, then models/loras."""
    return [*files.loras(), *folder_paths.get_filename_list("loras")]


def load(model: Any, path: Path, strength: float) -> tuple[Any, dict[str, Any]]:
    """The tuned MODEL and the metadata; every tensor of the file must find its weight. A full fine-tune's differences load alike."""
    tensors, metadata, _ = read_lora(path)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    tuned = model.clone()
    applied = tuned.add_patches(patches, strength)
    modules = {key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}
    modules |= {key for key in tensors if is_delta([key])}  # a weight and its bias are patches of their own
    text = {m for m in modules if m.startswith(("lora_te", "text_encoder"))}
    if len(applied) < len(modules) - len(text) or not applied:
        raise ValueError(f"{path.name} was made for another model: only {len(applied)} of its {len(modules)} modules exist in this one")
    if text:
        raise ValueError(f"{path.name} also changes the text encoder: use the stock Load LoRA for it")
    marks = ("lora_up", "lora_B", ".up.weight", ".diff")
    ups = [value for key, value in tensors.items() if any(mark in key for mark in marks)]
    if ups and not any(bool(value.any()) for value in ups):
        raise ValueError(f"{path.name} changes nothing: its weights are all zero")
    tuned.set_attachments(ATTACHMENT, metadata)
    return tuned, metadata


class LoadRewardLora(io.ComfyNode):
    """MODEL -> tuned MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLLoadLora",
            display_name="Load Reward LoRA",
            category=f"{CATEGORY}/sampling",
            description="Loads a LoRA and what its file recommends, so that a switch can be set to auto. Refuses a LoRA of another model.",
            inputs=[
                io.Model.Input("model", tooltip="The base model."),
                io.Combo.Input("lora_name", options=names(), tooltip="demo-*: for the demo model. Others: files in models/loras."),
                io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, tooltip="1 is as trained."),
            ],
            outputs=[
                io.Model.Output("tuned", display_name="MODEL", tooltip="Base with LoRA: the tuned part of a switch."),
                io.Float.Output(
                    "switch_sigma", display_name="switch σ", tooltip="Noise level it was trained from; 0 if the file does not say."
                ),
                io.String.Output("info", display_name="info", tooltip="What the file says of its training."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        """Load."""
        ours = files.loras()
        path = ours[lora_name] if lora_name in ours else Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        tuned, metadata = load(model, path, strength)
        lines = [f"{key}: {value}" for key, value in metadata.items()] or ["no ImageReFL metadata"]
        return io.NodeOutput(tuned, float(metadata.get("switch_sigma", 0.0)), "\n".join(lines))


NODES = [LoadRewardLora]
