"""Single-file checkpoints: what the file lacks comes from configs.py, from open_clip (CLIP's vocabulary), or from a named folder."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..lora.scales import is_scale
from .clip_words import write_tokenizer
from .configs import ZERO_SNR, Config, ModelConfig, PartClass
from .diffusers_policy import DiffusersPolicy
from .quantised import read_scaled, refuse_scales
from .quiet import without_dtype_warning

_PREFIX = "model.diffusion_model."
_OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "v_pred", "ztsnr")
_WITH_WEIGHTS = ("Autoencoder", "CLIPText", "T5Encoder", "Qwen", "Anima", "Cosmos")
_T5_MARKS = ("text_encoders.t5xxl.",)
_MARKS = {
    "vae": ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
"""Beginnings of tensor names that a file with the part has."""


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors by name; refuses a file that was cut short."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors checkpoints are read; a .ckpt can run code when it is opened")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}; was its download cut short?") from error


@contextmanager
def one_line_errors(path: Path) -> Generator[None]:
    """Shorten a library's error about files that it cannot load to one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0].split(" If you want")[0].rstrip(" .")
        raise ValueError(f"{path} cannot be loaded: {reason}") from error
    except KeyError as error:  # of a converter
        raise ValueError(f"{path} cannot be loaded: it lacks {error.args[0]}, or has it under another name") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"{path} cannot be loaded: weights of a text encoder are another model's") from error


def load_part(folder: Path, part: PartClass, dtype: torch.dtype) -> Any:
    """One component of a diffusers folder."""
    import diffusers
    import transformers

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: the model is incomplete")
    library: Any = {"diffusers": diffusers, "transformers": transformers}[part[0]]
    options: dict[str, Any] = {"torch_dtype": dtype} if part[1].startswith(_WITH_WEIGHTS) else {}
    with without_dtype_warning(), one_line_errors(folder):
        return getattr(library, part[1]).from_pretrained(folder, **options)


def single_file_pipeline(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype, parts: str | Path = "") -> Any:
    """The diffusers pipeline of a checkpoint of that family; `parts` is a diffusers folder for what the file lacks."""
    import diffusers

    shapes, scheduler = tensor_shapes(path), config.scheduler
    marked = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}  # the community's marker tensors
    marked |= ZERO_SNR if "ztsnr" in shapes else {}
    scheduler = scheduler[0], {**scheduler[1], **marked}
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in shapes) else ""
    inside = {key: shape for key, shape in shapes.items() if key.startswith(prefix) and not key.startswith(_OTHER_PARTS)}
    scales = list(filter(is_scale, shapes))
    refuse_scales(path, (key for key in scales if key.startswith(_OTHER_PARTS[:2])))
    given = _missing_parts(path, family, config, shapes, Path(parts) if parts else None, dtype)
    _check_all_read(path, family, config, {key: shape for key, shape in inside.items() if not is_scale(key)})
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), family, config, scheduler)
        clips = [name for name, (part, _) in config.parts.items() if part[1].startswith("CLIPText")]
        for name, pad in zip(clips, config.pads):
            tokenizer = name.replace("text_encoder", "tokenizer")
            given.setdefault(tokenizer, clip_tokenizer(Path(folder) / f"{tokenizer}_words", pad))
        with without_dtype_warning(), one_line_errors(path):
            if any(key in inside for key in scales):
                network: Any = getattr(diffusers, config.parts[family.network_name][0][1])
                tensors = read_scaled(path, dtype, prefix)
                options = {"config": folder, "subfolder": family.network_name, "local_files_only": True, "torch_dtype": dtype}
                given[family.network_name] = network.from_single_file(tensors, **options)
            options = {"local_files_only": True, "torch_dtype": dtype, **family.arguments, **given}
            return family.pipeline_class().from_single_file(str(path), config=folder, **options)


def _check_all_read(path: Path, family: type[DiffusersPolicy], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError for a tensor of the denoiser that diffusers' converter leaves unread; the converter runs on shapes alone."""
    (_, kind), settings = config.parts[family.network_name]
    given = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    left = dict(given)
    try:
        found = converter(kind)(checkpoint=left, config=settings)
    except Exception:  # a file that lacks tensors: loading names them
        return
    remaining = {id(value) for value in left.values()} - {
        id(value) for value in found.values()
    }  # the converters pop what they read, or copy it
    unread = [key for key, value in given.items() if id(value) in remaining]
    if unread:
        raise ValueError(f"{path} holds {len(unread)} tensors that {kind} has no place for, first {unread[0]}")


def converter(kind: str) -> Any:
    """diffusers' own converter from original names."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"this diffusers reads no single files of {kind}: pip install --upgrade diffusers")
    return SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]


def _missing_parts(
    path: Path, family: type[DiffusersPolicy], config: ModelConfig, shapes: Mapping[str, Any], parts: Path | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Components that the file lacks, from the folder `parts`; None for an optional one that is nowhere."""
    given: dict[str, Any] = {}
    for name, (part, _) in config.parts.items():
        marks = _T5_MARKS if name == config.t5 else _MARKS.get(name, "")
        scale = next((key for key in shapes if key.startswith(marks) and is_scale(key)), None) if marks else None
        if name == family.network_name or (scale is None and any(key.startswith(marks) for key in shapes)):
            continue
        if scale is not None and not (parts is not None and (parts / name).is_dir()):
            raise ValueError(f"{path}: its {name} is quantised ({scale}): name a diffusers folder that has one (parts = FOLDER)")
        if parts is not None and (parts / name).is_dir():
            given[name] = load_part(parts / name, part, dtype)
        elif name in family.optional:
            given[name] = None
        else:
            raise ValueError(f"{path} holds no {name}: name a diffusers folder that has one (parts = FOLDER)")
    if config.t5:
        folder = config.t5.replace("text_encoder", "tokenizer")
        if given.get(config.t5, config) is None:
            given[folder] = None
        elif parts is None or not (parts / folder).is_dir():
            raise ValueError(
                f"{path} needs T5's tokenizer, which no package brings: name a diffusers folder with {folder} (parts = FOLDER)"
            )
        else:
            given[folder] = load_part(parts / folder, ("transformers", "AutoTokenizer"), dtype)
    return given


def _write_configs(folder: Path, family: type[DiffusersPolicy], config: ModelConfig, scheduler: tuple[str, Config]) -> None:
    """A diffusers folder without weights."""
    index: Config = {"_class_name": family.pipeline_name, "scheduler": ["diffusers", scheduler[0]], **family.index}
    for name, ((library, part), settings) in config.parts.items():
        t5 = name == config.t5
        index[name] = [library, part]
        if library == "diffusers":
            settings = {"_class_name": part, **settings}
        else:
            settings = {"architectures": [part], "model_type": "t5" if t5 else "clip_text_model", **settings}
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler[0], **scheduler[1]}), "utf-8")


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """transformers' CLIPTokenizer from the vocabulary that open_clip ships; its files are left in `folder`."""
    import open_clip
    from transformers import CLIPTokenizer

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]  # as CLIP cuts it
    write_tokenizer(folder, merges, pad)
    return CLIPTokenizer.from_pretrained(folder)
