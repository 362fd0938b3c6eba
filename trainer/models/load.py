"""From a path to a policy: a diffusers folder, the authors' folder of two UNets, or a single-file checkpoint.

Nothing is downloaded. A family of models is one file of this package and one entry of FAMILIES.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..lora.foreign import other_family
from .anima import AnimaPolicy
from .chroma import ChromaPolicy
from .configs import ZERO_SNR, ModelConfig
from .diffusers_policy import DiffusersPolicy
from .flux import FluxPolicy
from .klein import KleinPolicy
from .krea import KreaPolicy
from .quantisation import NONE, Quantisation, has_quantised, is_quantised, original_shape, quantise, scales
from .quantised import refuse_scales
from .qwen import QwenPolicy
from .sd3 import SD3Policy
from .sdxl import SDXLPolicy
from .single_file import one_line_errors, single_file_pipeline, tensor_shapes
from .split_files import NOTHING, Given, split_files_pipeline
from .two_unets import BASE_UNET, two_unets_pipeline
from .unet import UNetPolicy
from .zimage import ZImagePolicy

FAMILIES: list[type[DiffusersPolicy]] = [
    UNetPolicy,
    SDXLPolicy,
    SD3Policy,
    FluxPolicy,
    ZImagePolicy,
    KleinPolicy,
    KreaPolicy,
    QwenPolicy,
    ChromaPolicy,
    AnimaPolicy,
]
MODELS: dict[str, tuple[type[DiffusersPolicy], ModelConfig]] = {
    name: (family, config) for family in FAMILIES for name, config in family.published.items()
}
"""Published models by name."""
_PARTS = {
    r"^decoder\.(conv_in|conv1|up\.\d|up_blocks)\b": "an autoencoder",
    r"^(model\.)?(language_model\.)?embed_tokens\.|^shared\.weight|^text_model\.": "a text encoder",
}
"""Names of tensors that a file has which holds one part of a model, and the part."""
INDICES = ("model_index.json", "modular_model_index.json")
"""What a diffusers folder states its parts in."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model's files are read, where they do not state it themselves."""

    dtype: str = field(default="float32", metadata={"help": "of the frozen weights: float32 or bfloat16 (half the memory)"})
    prediction: str = field(default="", metadata={"help": "epsilon, v_prediction or v_prediction+ztsnr, where a UNet's file does not say"})
    parts: str = field(default="", metadata={"help": "diffusers folder for what a single file lacks: T5 and its tokenizer, say"})
    text_encoder: str = field(default="", metadata={"help": "file of a split model's text encoder, where it is not in ComfyUI's folders"})
    vae: str = field(default="", metadata={"help": "file of a split model's VAE, likewise"})
    schedule: str = field(default="", metadata={"help": "whose noise levels, where a file may be base or turbo: z-image-turbo, say"})
    quantisation: str = field(
        default="",
        metadata={"help": "of the frozen denoiser's linear layers: int8 or fp8 (pip install torchao), nf4 (bitsandbytes, on a GPU)"},
    )
    text_encoder_quantisation: str = field(default="", metadata={"help": "of the text encoders' linear layers: int8, fp8 or nf4"})


def load_policy(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | tuple[int, int] | None = None,
    prediction: str = "",
    parts: str | Path = "",
    offload: bool = False,
    given: Given = NOTHING,
    quantisation: Quantisation = NONE,
) -> DiffusersPolicy:
    """A policy over the model at `path`; `dtype`, `image_size` and `offload` as of DiffusersPolicy.

    `prediction`: `epsilon`, `v_prediction` or `v_prediction+ztsnr` (zero terminal SNR), where a UNet's file does not state it or is wrong.
    `parts`: a diffusers folder for what a single file lacks; `given`: what else is named of a model in split files; `quantisation`:
    formats of the linear layers. Raises ValueError or FileNotFoundError with one line.
    """
    path = Path(path)
    quantisation.check(torch.device(device))
    for file in (*path.glob("*/*.safetensors"), *(Path(parts).glob("*/*.safetensors") if parts else ())):
        refuse_scales(file, tensor_shapes(file))  # before anything is loaded: libraries do not name the file that was cut short
    family, config = resolve(path)
    if config is None:
        _refuse_given(path, given)
        with one_line_errors(path):
            pipeline = family.load_pipeline(path, dtype, quantisation)
    elif path.is_file():
        markers = tensor_shapes(path).keys() & {"v_pred", "ztsnr"}
        if markers == {"ztsnr"} and not prediction:
            raise ValueError(f"{path} has the marker ztsnr without v_pred: say prediction = v_prediction if it predicts v")
        if family.split_files:
            pipeline = split_files_pipeline(path, family, config, dtype, parts, given)
        else:
            _refuse_given(path, given)
            pipeline = single_file_pipeline(path, family, config, dtype, parts)
    else:
        pipeline = two_unets_pipeline(path, family, config, dtype)
    if prediction:
        if not issubclass(family, UNetPolicy):
            raise ValueError(f"prediction = {prediction!r} is for UNets: {path} predicts a flow")
        _set_prediction(path, pipeline, prediction)
    _check_complete(path, pipeline)
    _check_finite(path, pipeline)
    for name, part in pipeline.components.items():
        if part is not None and (kind := quantisation.kind(name)) and not has_quantised(part):  # diffusers quantises folders alone
            quantise(part, kind, dtype)
    policy = family(pipeline, device, dtype, image_size, offload)
    policy.quantisation = quantisation
    return policy


def _refuse_given(path: Path, given: Given) -> None:
    key = next((f.name for f in fields(given) if getattr(given, f.name)), "")
    if key:
        raise ValueError(f"{key} = {getattr(given, key)!r} is for a model in split files, as Z-Image's: {path} is none")


def _set_prediction(path: Path, pipeline: Any, prediction: str) -> None:
    """`epsilon` or `v_prediction`; `v_prediction+ztsnr` also rescales the schedule to zero terminal SNR."""
    kind, plus, zero = prediction.partition("+")
    if not plus:
        pipeline.scheduler.register_to_config(prediction_type=prediction)
        return
    if (kind, zero) != ("v_prediction", "ztsnr"):
        raise ValueError(f"prediction = {prediction!r}: use epsilon, v_prediction or v_prediction+ztsnr")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=kind, **ZERO_SNR)
    if not pipeline.scheduler.config.get("rescale_betas_zero_snr", False):
        raise ValueError(f"{path}: its {type(pipeline.scheduler).__name__} has no zero terminal SNR: use DDPMScheduler or DDIMScheduler")


def resolve(path: Path) -> tuple[type[DiffusersPolicy], ModelConfig | None]:
    """The family of the model at `path`, and its published configuration unless a diffusers folder states its own."""
    if path.is_file():
        shapes = tensor_shapes(path)
        try:
            return MODELS[detect(shapes)]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if (path / BASE_UNET).is_dir():  # the authors' published folder, whose index asks for code from the hub
        return MODELS["sdxl" if (path / "text_encoder_2").is_dir() else "sd15"]
    index = next((file for file in (path / name for name in INDICES) if file.is_file()), path / INDICES[0])
    if not index.is_file() and path.is_dir():
        raise FileNotFoundError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    if not index.is_file():
        raise FileNotFoundError(f"no model at {path}: give a diffusers folder or a .safetensors checkpoint")
    with one_line_errors(index):
        name = str(json.loads(index.read_text("utf-8")).get("_class_name"))
    family = next((family for family in FAMILIES if family.pipeline_name == name), None)
    if family is None:
        known = [family.pipeline_name for family in FAMILIES]
        near = difflib.get_close_matches(name, known, 1, 0.75)
        nearest = f", which is not supported; nearest: {near[0]}" if near else ""
        raise ValueError(f"{path} is a {name}{nearest}: known are {', '.join(known)}")
    return family, None


def detect(shapes: Mapping[str, Sequence[int]]) -> str:
    """The name in MODELS of a single-file checkpoint with tensors of these names and shapes."""
    inside = {key.removeprefix("model.diffusion_model.").removeprefix("net."): tuple(shape) for key, shape in shapes.items()}
    if any(".lora_" in key for key in inside):
        raise ValueError("it is a LoRA, not a model")
    try:
        name = next((name for family in FAMILIES if (name := family.detect(inside))), None)
    except IndexError as error:  # a family looks at a dimension that the tensor of that name has not
        raise ValueError("its tensors have a model's names, and too few dimensions") from error
    if name is not None:
        return name
    part = next((part for mark, part in _PARTS.items() if any(re.search(mark, key) for key in inside)), "")
    if part:
        raise ValueError(
            f"it is {part}, not a model: give the file of the network, in ComfyUI models/diffusion_models or models/checkpoints"
        )
    if family := other_family(inside):
        raise ValueError(f"it {family.replace('is for', 'is', 1)}")
    raise ValueError(f"it is not a known model: known are {', '.join(MODELS)}")


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
        missing += [key for key, p in part.named_parameters() if in_files and in_files[original_shape(p)] == 0]
        lacking = sum((Counter(original_shape(p) for p in part.parameters()) - in_files).values()) if in_files else 0
        if missing or lacking:
            first = f", {missing[0]} for example" if missing else ""
            raise ValueError(f"{path}: the files of its {name} lack {max(len(missing), lacking)} weights{first}, or are another model's")


def _check_finite(path: Path, pipeline: Any) -> None:
    """Refuse a model with a weight that is not finite: it would draw black images."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            endless = next((key for key, p in _numbers(part) if not bool(p.sum(dtype=torch.float32).isfinite())), None)
            if endless is not None:
                raise ValueError(f"{path} is damaged: {endless} of its {name} has values that are not finite")


def _numbers(part: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, and in place of quantised ones their scales."""
    for path, module in part.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            for value in scales(parameter) if key == "weight" and is_quantised(module) else [parameter]:
                yield f"{path}.{key}".removeprefix("."), value
