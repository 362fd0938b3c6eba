"""From a path to a policy: a diffusers folder, the authors' folder of two UNets, or a single-file checkpoint.

Nothing is downloaded. A family of models is one file of this package and one entry of FAMILIES.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .configs import ModelConfig
from .diffusers_policy import DiffusersPolicy, without_dtype_warning
from .flux import FluxPolicy
from .sd3 import SD3Policy
from .sdxl import SDXLPolicy
from .single_file import load_part, one_line_errors, single_file_pipeline, tensor_shapes
from .unet import UNetPolicy

FAMILIES: list[type[DiffusersPolicy]] = [UNetPolicy, SDXLPolicy, SD3Policy, FluxPolicy]
MODELS: dict[str, tuple[type[DiffusersPolicy], ModelConfig]] = {
    name: (family, config) for family in FAMILIES for name, config in family.published.items()
}
"""Published models by name."""

BASE_UNET, TUNED_UNET = "original_unet", "fine_tuned_unet"
_KNOWN = "Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and 3.5, FLUX.1"


@dataclass(frozen=True)
class ModelOptions:
    """How a model's files are read, where they do not state it themselves."""

    dtype: str = field(default="float32", metadata={"help": "of the frozen weights: float32 or bfloat16 (half the memory)"})
    prediction: str = field(default="", metadata={"help": "epsilon or v_prediction, where a UNet's file does not say or is wrong"})
    parts: str = field(default="", metadata={"help": "diffusers folder for what a single file lacks: T5 and its tokenizer, say"})


def load_policy(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | tuple[int, int] | None = None,
    prediction: str = "",
    parts: str | Path = "",
    offload: bool = False,
) -> DiffusersPolicy:
    """A policy over the model at `path`; `dtype`, `image_size` and `offload` as of DiffusersPolicy.

    `prediction`: `epsilon` or `v_prediction`, where a UNet's file does not state it or is wrong. `parts`: a diffusers folder
    for what a single file lacks. Raises ValueError or FileNotFoundError with one line.
    """
    path = Path(path)
    for file in (*path.glob("*/*.safetensors"), *(Path(parts).glob("*/*.safetensors") if parts else ())):
        tensor_shapes(file)  # before anything is loaded: libraries do not name the file that was cut short
    if path.is_file():
        shapes = tensor_shapes(path)
        family, config = MODELS[detect(shapes, f"{path}: ")]
        pipeline = single_file_pipeline(path, shapes, family, config, dtype, parts)
    elif (path / BASE_UNET).is_dir():
        family, config = two_unets(path)
        pipeline = _two_unets_pipeline(path, family, config, dtype)
    else:
        family = folder_family(path)
        with one_line_errors(path):
            pipeline = family.load_pipeline(path, dtype)
    if prediction:
        if not issubclass(family, UNetPolicy):
            raise ValueError(f"prediction = {prediction!r} is for UNets: {path} predicts a flow")
        pipeline.scheduler.register_to_config(prediction_type=prediction)
    _check_complete(path, pipeline)
    return family(pipeline, device, dtype, image_size, offload)


def detect(shapes: Mapping[str, Sequence[int]], prefix: str = "") -> str:
    """The name in MODELS of a single-file checkpoint with these tensors; errors begin with `prefix`."""
    inside = {key.removeprefix("model.diffusion_model."): tuple(shape) for key, shape in shapes.items()}
    if any(".lora_" in key for key in inside):
        raise ValueError(f"{prefix}it is a LoRA, not a model")
    try:
        names = [name for family in FAMILIES if (name := family.detect(inside))]
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
    if not names:
        raise ValueError(f"{prefix}it is not a known model: known are {_KNOWN}")
    return names[0]


def folder_family(path: Path) -> type[DiffusersPolicy]:
    """The family of a diffusers folder."""
    index = path / "model_index.json"
    if not index.is_file() and path.is_dir():
        raise FileNotFoundError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    if not index.is_file():
        raise FileNotFoundError(f"no model at {path}: give a diffusers folder or a .safetensors checkpoint")
    with one_line_errors(index):
        name = str(json.loads(index.read_text("utf-8")).get("_class_name"))
    family = next((family for family in FAMILIES if family.pipeline_name == name), None)
    if family is None:
        raise ValueError(f"{path} is a {name}: known are {_KNOWN}")
    return family


def two_unets(path: Path) -> tuple[type[DiffusersPolicy], ModelConfig]:
    """The family of the authors' published folder, whose index asks for code from the hub."""
    return MODELS["sdxl" if (path / "text_encoder_2").is_dir() else "sd15"]


def _two_unets_pipeline(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype) -> Any:
    parts: dict[str, Any] = {"unet": _unet(path / BASE_UNET, dtype)}
    for name, (part, _) in config.parts.items():
        if name != "unet":
            parts[name] = load_part(path / name, part, dtype)
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = load_part(path / tokenizer, ("transformers", "CLIPTokenizer"), dtype)
    parts["scheduler"] = load_part(path / "scheduler", ("diffusers", "DDPMScheduler"), dtype)
    return family.pipeline_class()(**parts, **family.arguments)


def with_unet(policy: DiffusersPolicy, folder: str | Path) -> DiffusersPolicy:
    """A policy with the UNet of another diffusers folder (`fine_tuned_unet`, say); all else is shared."""
    if not isinstance(policy, UNetPolicy):
        raise ValueError(f"{folder} is a UNet, the model has none")
    unet = _unet(Path(folder), policy.dtype)
    theirs, ours = _architecture(unet.config), _architecture(policy.network.config)
    if theirs != ours:
        raise ValueError(f"{folder} holds a UNet of another family: {theirs}, the model's is {ours}")
    pipeline = type(policy.pipeline)(**{**policy.arguments, **policy.pipeline.components, "unet": unet})
    return type(policy)(pipeline, policy.device, policy.dtype, policy.image_size)


def _architecture(config: Any) -> tuple[Any, ...]:
    return config["in_channels"], tuple(config["block_out_channels"]), config["cross_attention_dim"]


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers UNet: it has no config.json")
    with without_dtype_warning(), one_line_errors(folder):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)


def _check_complete(path: Path, pipeline: Any) -> None:
    """Refuse a model with weights that are in no file.

    diffusers leaves such weights without a value; transformers initialises them, and its files may use other names, so
    that shapes must be compared.
    """
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        missing = [key for key, p in part.named_parameters() if p.is_meta]
        in_files = Counter(shape for file in (path / name).glob("*.safetensors") for shape in tensor_shapes(file).values())
        missing += [key for key, p in part.named_parameters() if in_files and in_files[tuple(p.shape)] == 0]
        lacking = sum((Counter(tuple(p.shape) for p in part.parameters()) - in_files).values()) if in_files else 0
        if missing or lacking:
            first = f", {missing[0]} for example" if missing else ""
            raise ValueError(f"{path}: the files of its {name} lack {max(len(missing), lacking)} weights{first}, or are another model's")
