"""From a path to a policy: a diffusers folder, the authors' folder of two UNets, or a single-file checkpoint.

Nothing is fetched. A single file is known by the names and shapes in its header; its configuration is in configs.py, and
CLIP's vocabulary comes with open_clip. T5's vocabulary is in no package: a folder that has it must be named.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .clip_words import write_tokenizer
from .configs import FAMILIES, Config, Family
from .diffusers_policy import DiffusersPolicy, without_dtype_warning
from .flux import FluxPolicy
from .sd3 import SD3Policy
from .sdxl import SDXLPolicy
from .unet import UNetPolicy

POLICIES: dict[str, type[DiffusersPolicy]] = {
    "StableDiffusionPipeline": UNetPolicy,
    "StableDiffusionXLPipeline": SDXLPolicy,
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
}
"""By the class that `model_index.json` names."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model's files are to be taken, where they do not say it themselves."""

    dtype: str = field(default="float32", metadata={"help": "of the frozen weights: float32 or bfloat16 (half the memory)"})
    prediction: str = field(default="", metadata={"help": "epsilon or v_prediction, where a UNet's file does not say or is wrong"})
    parts: str = field(default="", metadata={"help": "diffusers folder for what a single file lacks: T5 and its tokenizer, say"})


BASE_UNET, TUNED_UNET = "original_unet", "fine_tuned_unet"
_KNOWN = "Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and 3.5, FLUX.1"


def load_policy(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | tuple[int, int] | None = None,
    prediction: str = "",
    parts: str | Path = "",
    park: bool = False,
) -> DiffusersPolicy:
    """A policy over the model at `path`; with `park` all of it stays on the CPU, and encoders come to the
    device while they run; `to(device)` then brings what trains, see DiffusersPolicy.park_encoders.

    `image_size`: pixels, see DiffusersPolicy. `prediction`: `epsilon` or `v_prediction` where a UNet's file does not say
    or is wrong. `parts`: a diffusers folder for what a single file lacks (T5 and its tokenizer, say). Raises ValueError
    or FileNotFoundError with one sentence.
    """
    path = Path(path)
    for file in (*path.glob("*/*.safetensors"), *(Path(parts).glob("*/*.safetensors") if parts else ())):
        _shapes(file)  # before anything is loaded: libraries do not say which file it is that was cut short
    if path.is_file():
        pipeline, kind = single_file_pipeline(path, dtype, parts=parts)
    elif (path / BASE_UNET).is_dir():
        pipeline, kind = _two_unets(path, dtype)
    elif (path / "model_index.json").is_file():
        with _one_line(path / "model_index.json"):
            name = str(json.loads((path / "model_index.json").read_text("utf-8")).get("_class_name"))
        if name not in POLICIES:
            raise ValueError(f"{path} is a {name}: known are {_KNOWN}")
        kind = POLICIES[name]
        with _one_line(path):
            pipeline = kind.load_pipeline(path, dtype)
    elif path.is_dir():
        raise FileNotFoundError(f"{path} is no diffusers pipeline: it has no model_index.json")
    else:
        raise FileNotFoundError(f"no model at {path}: give a diffusers folder or a .safetensors checkpoint")
    if prediction:
        if not issubclass(kind, UNetPolicy):
            raise ValueError(f"prediction = {prediction!r} is for UNets: {path} predicts a flow")
        pipeline.scheduler.register_to_config(prediction_type=prediction)
    _check_complete(path, pipeline)
    if not park:
        return kind(pipeline, device, dtype, image_size)
    policy = kind(pipeline, "cpu", dtype, image_size)
    policy.park_encoders()
    policy.device = torch.device(device)
    return policy


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a safetensors file's tensors; refuses one that was cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}; was its download cut short?") from error


def _check_complete(path: Path, pipeline: Any) -> None:
    """Refuse a model some of whose weights were in no file.

    diffusers leaves such weights without a value; transformers draws them, and its files may use other names, so that the
    shapes must tell.
    """
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        missing = [key for key, p in part.named_parameters() if p.is_meta]
        held = Counter(shape for file in (path / name).glob("*.safetensors") for shape in _shapes(file).values())
        missing += [key for key, p in part.named_parameters() if held and held[tuple(p.shape)] == 0]
        lacking = sum((Counter(tuple(p.shape) for p in part.parameters()) - held).values()) if held else 0
        if missing or lacking:
            first = f", {missing[0]} say" if missing else ""
            raise ValueError(f"{path}: the files of its {name} lack {max(len(missing), lacking)} weights{first}, or are another model's")


@contextmanager
def _one_line(path: Path) -> Generator[None]:
    """What a library says of files that it cannot load, without its advice."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error).splitlines()[0].split(" If you want")[0].rstrip(" .")
        raise ValueError(f"{path} cannot be loaded: {said}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"{path} cannot be loaded: weights of a text encoder are another model's") from error


def with_unet(policy: DiffusersPolicy, folder: str | Path) -> DiffusersPolicy:
    """The same policy with the UNet of a diffusers folder of its own (`fine_tuned_unet`, say); all else is shared."""
    if not isinstance(policy, UNetPolicy):
        raise ValueError(f"{folder} is a UNet, the model has none")
    unet = _unet(Path(folder), policy.dtype)
    theirs, ours = _shape(unet.config), _shape(policy.network.config)
    if theirs != ours:
        raise ValueError(f"{folder} holds a UNet of another family: {theirs}, the model's is {ours}")
    pipeline = type(policy.pipeline)(**{**policy.load_arguments(), **policy.pipeline.components, "unet": unet})
    return type(policy)(pipeline, policy.device, policy.dtype, policy.image_size)


def _shape(config: Any) -> tuple[Any, ...]:
    return config["in_channels"], tuple(config["block_out_channels"]), config["cross_attention_dim"]


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers UNet: it has no config.json")
    with without_dtype_warning(), _one_line(folder):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)


def _two_unets(path: Path, dtype: torch.dtype) -> tuple[Any, type[DiffusersPolicy]]:
    """The layout of the authors' published models: no `unet`, and an index that asks for code from the hub."""
    family = FAMILIES["sdxl" if (path / "text_encoder_2").is_dir() else "sd15"]
    unet = _unet(path / BASE_UNET, dtype)
    parts = {name: _part(path / name, kind, dtype) for name, (kind, _) in family.parts.items() if name != "unet"}
    names = ["scheduler", *(name.replace("text_encoder", "tokenizer") for name in parts if name.startswith("text_encoder"))]
    kinds = {"scheduler": ("diffusers", "DDPMScheduler"), "tokenizer": ("transformers", "CLIPTokenizer")}
    parts |= {name: _part(path / name, kinds[name.removesuffix("_2")], dtype) for name in names}
    kind = POLICIES[family.pipeline]
    return kind.pipeline_class()(unet=unet, **parts, **kind.load_arguments()), kind


def _part(folder: Path, kind: tuple[str, str], dtype: torch.dtype) -> Any:
    """One part of a diffusers folder."""
    import diffusers
    import transformers

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: the model is incomplete")
    library: Any = {"diffusers": diffusers, "transformers": transformers}[kind[0]]
    given: dict[str, Any] = {"torch_dtype": dtype} if kind[1].startswith(("Autoencoder", "CLIPText", "T5Encoder")) else {}
    with without_dtype_warning(), _one_line(folder):
        return getattr(library, kind[1]).from_pretrained(folder, **given)


# -- single files ------------------------------------------------------------------------------------------------------


def detect(shapes: Mapping[str, Sequence[int]]) -> str:
    """The name in FAMILIES of a checkpoint with tensors of these names and shapes; raises ValueError with one sentence."""
    inside = {key.removeprefix("model.diffusion_model."): tuple(shape) for key, shape in shapes.items()}
    if "input_blocks.0.0.weight" in inside:
        channels = inside["input_blocks.0.0.weight"][1]
        if channels != 4:
            raise ValueError(f"its UNet takes {channels} channels: inpainting and editing models are not supported")
        width = next((shape[1] for key, shape in inside.items() if key.endswith("attn2.to_k.weight")), 0)
        known = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
        if width not in known:
            raise ValueError(f"its UNet reads text embeddings of width {width}: known are {_KNOWN}")
        return known[width]
    if "joint_blocks.0.x_block.attn.qkv.weight" in inside:
        width = inside["joint_blocks.0.x_block.attn.qkv.weight"][1]
        dual = "joint_blocks.0.x_block.attn2.qkv.weight" in inside
        known = {(1536, False): "sd3-medium", (1536, True): "sd35-medium", (2432, False): "sd35-large"}
        if (width, dual) in known:
            return known[width, dual]
    if inside.get("double_blocks.0.img_attn.qkv.weight") == (9216, 3072):
        return "flux-dev" if any(key.startswith("guidance_in.") for key in inside) else "flux-schnell"
    raise ValueError(f"it is of no known family: known are {_KNOWN}")


def single_file_pipeline(path: Path, dtype: torch.dtype, family: Family | None = None, parts: str | Path = "") -> tuple[Any, Any]:
    """The diffusers pipeline of a single-file checkpoint, and its policy's class. `family`: if it is not to be detected."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors checkpoints are read; a .ckpt can run code when it is opened")
    shapes = _shapes(path)
    if any(".lora_" in key for key in shapes):
        raise ValueError(f"{path} is a LoRA, not a model")
    try:
        family = family or FAMILIES[detect(shapes)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = _marked(family, shapes)
    given = _missing_parts(path, family, shapes, Path(parts) if parts else None, dtype)
    kind = POLICIES[family.pipeline]
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), family)
        given |= _tokenizers(Path(folder), family, given)
        with without_dtype_warning(), _one_line(path):
            arguments = {**kind.load_arguments(), **given}
            pipeline = kind.pipeline_class().from_single_file(
                str(path), config=folder, local_files_only=True, torch_dtype=dtype, **arguments
            )
    return pipeline, kind


def _marked(family: Family, shapes: Mapping[str, Any]) -> Family:
    """The family with what the community's marker tensors say of the schedule."""
    name, config = family.scheduler
    if "v_pred" in shapes:
        config = {**config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in shapes}
    return replace(family, scheduler=(name, config))


# A name that each part has in a single file, where the file has the part
_MARKS = {
    "vae": ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}


def _missing_parts(path: Path, family: Family, shapes: Mapping[str, Any], parts: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """What the file lacks, from the folder `parts`."""
    t5 = f"text_encoder_{family.t5}" if family.t5 else ""
    marks = {**_MARKS, t5: _MARKS["text_encoder_3"]}
    given: dict[str, Any] = {}
    for name, (kind, _) in family.parts.items():
        if name in ("unet", "transformer") or any(key.startswith(marks[name]) for key in shapes):
            continue
        if parts is not None and (parts / name).is_dir():
            given[name] = _part(parts / name, kind, dtype)
        elif name == t5 and family.pipeline == "StableDiffusion3Pipeline":
            given[name] = None  # SD3 does without
        else:
            raise ValueError(f"{path} holds no {name}: name a diffusers folder that has one (parts = FOLDER)")
    if t5 and given.get(t5, family) is not None:
        folder = f"tokenizer_{family.t5}"
        if parts is None or not (parts / folder).is_dir():
            raise ValueError(
                f"{path} needs T5's tokenizer, which no package brings: name a diffusers folder with {folder} (parts = FOLDER)"
            )
        given[folder] = _part(parts / folder, ("transformers", "AutoTokenizer"), dtype)
    elif t5:
        given[f"tokenizer_{family.t5}"] = None
    return given


def _write_configs(folder: Path, family: Family) -> None:
    """A diffusers folder without weights."""
    index: Config = {"_class_name": family.pipeline, "scheduler": ["diffusers", family.scheduler[0]]}
    for name, (kind, config) in family.parts.items():
        index[name] = list(kind)
        (folder / name).mkdir()
        described = {"_class_name": kind[1]} if kind[0] == "diffusers" else {"architectures": [kind[1]], "model_type": _model_type(kind[1])}
        (folder / name / "config.json").write_text(json.dumps({**described, **config}), "utf-8")
        if name.startswith("text_encoder"):
            index[name.replace("text_encoder", "tokenizer")] = [
                "transformers",
                "T5TokenizerFast" if kind[1].startswith("T5") else "CLIPTokenizer",
            ]
    if family.pipeline == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": family.scheduler[0], **family.scheduler[1]}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), "utf-8")


def _model_type(kind: str) -> str:
    return "t5" if kind.startswith("T5") else "clip_text_model"


def _tokenizers(folder: Path, family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP's tokenizer for each CLIP of the family."""
    names = [n.replace("text_encoder", "tokenizer") for n, (kind, _) in family.parts.items() if kind[1].startswith("CLIPText")]
    return {n: clip_tokenizer(folder / f"words{i}", pad) for i, (n, pad) in enumerate(zip(names, family.pads)) if n not in given}


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """transformers' CLIPTokenizer from the vocabulary that open_clip ships; its files are left in `folder`."""
    import open_clip
    from transformers import CLIPTokenizer

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]  # as CLIP cuts it
    write_tokenizer(folder, merges, pad)
    return CLIPTokenizer.from_pretrained(folder)
