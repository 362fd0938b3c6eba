"""Loading and saving a reward LoRA together with what its file says of its training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..trainer.demo import files
from ..trainer.lora.file import read_lora, write_tensors
from ..trainer.lora.names import is_delta
from ..trainer.runtime.embedded import check_files
from ..trainer.training.folder import COMPANIONS
from .sockets import CATEGORY, LoraWeights, schema
from .switch import ATTACHMENT


class TrainedLora(dict[str, Tensor]):
    """LORA_MODEL: tensors by their names, as the stock nodes take them, with the metadata of the run that trained them."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.header = {"imagerefl": json.dumps(metadata, sort_keys=True)}


_MODULE = re.compile(r"(.+?)\.(lora_|hada_|lokr_|oft_|boft_|[ab][12]\.|dora_scale)")  # the module that a tensor of an adapter is for
_RUN = "run: "  # before the name of a training run


def embedded() -> dict[str, Path]:
    """The embedded model's LoRAs by name: those of rewards, and `demo-consistency`, which draws in a few steps."""
    return {**files.loras(), "demo-consistency": files.CONSISTENCY}


def names() -> list[str]:
    """The embedded model's own LoRAs, models/loras, and those of finished training runs, newest first."""
    return [*embedded(), *folder_paths.get_filename_list("loras"), *_trained()]


def _trained() -> dict[str, Path]:
    """LoRAs of finished runs, and their companions, `run: NAME (loser)`."""
    runs = sorted(runs_folder().glob("*/lora.safetensors"), key=lambda path: -path.stat().st_mtime)
    found = ((path, f"{_RUN}{path.parent.name}", name) for path in runs for name in ("", *COMPANIONS))
    files = {f"{run} ({name})" if name else run: path.with_stem("-".join(filter(None, ("lora", name)))) for path, run, name in found}
    return {name: path for name, path in files.items() if path.is_file()}


def runs_folder() -> Path:
    """Where training runs keep their state and LoRA."""
    return Path(folder_paths.get_output_directory()) / "imagerefl"


def path_of(name: str) -> Path:
    """The file of a name that `names` lists."""
    ours = embedded()
    if name.startswith(_RUN):
        path = _trained().get(name)
        if path is None:
            raise ValueError(f"{name} has no LoRA: its run is not finished; resume it")
        return path
    if name not in ours:
        return Path(folder_paths.get_full_path_or_raise("loras", name))
    check_files(ours[name].parent, ours[name].name)
    return ours[name]


def stamp(name: str) -> str:
    """Another text whenever the file of a name changes, so that ComfyUI does not take its earlier result."""
    path = path_of(name)
    found = path.stat()
    return f"{path} {found.st_mtime_ns} {found.st_size}"


def load(model: Any, path: Path, strength: float) -> tuple[Any, dict[str, Any]]:
    """The tuned MODEL and the metadata; every tensor of the file must find its weight. A full fine-tune's differences load alike."""
    tensors, metadata, _ = read_lora(path)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    tuned = model.clone()
    applied = tuned.add_patches(patches, strength)
    modules = {found.group(1) for key in tensors if (found := _MODULE.match(key))}
    modules |= {key for key in tensors if is_delta([key])}  # a weight and its bias are patches of their own
    text = {m for m in modules if m.startswith(("lora_te", "text_encoder"))}
    if len(applied) < len(modules) - len(text) or not applied:
        raise ValueError(f"{path.name} was made for another model: only {len(applied)} of its {len(modules)} modules exist in this one")
    _check_shapes(model, patches, path)
    if text:
        raise ValueError(f"{path.name} also changes the text encoder: use the stock Load LoRA for it")
    marks = ("lora_up", "lora_B", ".up.weight", ".diff")
    ups = [value for key, value in tensors.items() if any(mark in key for mark in marks)]
    if ups and not any(bool(value.any()) for value in ups):  # tensors of a file, on the CPU
        raise ValueError(f"{path.name} changes nothing: its weights are all zero")
    tuned.set_attachments(ATTACHMENT, metadata)
    return tuned, metadata


def _check_shapes(model: Any, patches: Mapping[Any, Any], path: Path) -> None:
    """ValueError for a LoRA of another size of this family, as klein 4B's for 9B: ComfyUI would log each module and leave it out."""
    for key, patch in patches.items():
        weights = getattr(patch, "weights", None)
        name, cut = (key, None) if isinstance(key, str) else (key[0], key[1])
        weight = comfy.utils.get_attr(model.model, name)
        if getattr(patch, "name", "") != "lora" or weights is None or not weight.is_floating_point():
            continue
        shape = list(weight.shape)
        if cut is not None:
            shape[cut[0]] = cut[2]
        given = [len(weights[0]), weights[1].flatten(1).shape[1]]
        if weights[3] is None and given != [shape[0], math.prod(shape[1:])]:
            raise ValueError(f"{path.name} is for another size of this model: {name} is {tuple(shape)} here, {tuple(given)} in the LoRA")


class LoadRewardLora(io.ComfyNode):
    """MODEL -> tuned MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLLoadLora",
            display_name="Load Reward LoRA",
            search_aliases=["load imagerefl lora", "refl lora", "srpo lora"],
            category=f"{CATEGORY}/sampling",
            description="Loads a LoRA and what its file recommends, so that a switch can be set to auto. Refuses a LoRA of another model.",
            inputs=[
                io.Model.Input("model", tooltip="The base model."),
                io.Combo.Input(
                    "lora_name",
                    options=names(),
                    tooltip="demo-*: for the demo model. run: …: the result of a training run here. Others: files in models/loras.",
                ),
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
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        """A file may change under its name."""
        return stamp(lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        """Load."""
        tuned, metadata = load(model, path_of(lora_name), strength)
        lines = [f"{key}: {value}" for key, value in metadata.items()] or ["no ImageReFL metadata"]
        return io.NodeOutput(tuned, float(metadata.get("switch_sigma", 0.0)), "\n".join(lines))


class SaveRewardLora(io.ComfyNode):
    """LORA_MODEL -> a file. The stock node writes no metadata, and has another id in each version of ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSaveLora",
            display_name="Save Reward LoRA",
            category=f"{CATEGORY}/training",
            description="Saves a trained LoRA with its switch and settings, so that Load Reward LoRA can set a switch to auto.",
            search_aliases=["save lora weights", "export lora"],
            is_output_node=True,
            inputs=[
                LoraWeights.Input("lora", tooltip="LORA_MODEL of a training node."),
                io.String.Input(
                    "prefix",
                    default="loras/imagerefl",
                    tooltip="File below ComfyUI's output folder; loras/… is in every LoRA loader's list.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, lora: dict[str, Tensor], prefix: str) -> io.NodeOutput:
        """Save."""
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
        path = Path(folder, f"{name}_{counter:05}_.safetensors")
        write_tensors(lora, path, getattr(lora, "header", {}), lambda _: None)
        return io.NodeOutput()


NODES = [LoadRewardLora, SaveRewardLora]
