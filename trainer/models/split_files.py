"""Models whose parts are files of their own: a checkpoint of the network alone, and a folder for the rest."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .comfy_files import find_part, find_tokenizer, load_file_part
from .configs import Config, ModelConfig, PartClass
from .diffusers_policy import DiffusersPolicy
from .quantised import read_scaled
from .quiet import without_dtype_warning
from .single_file import converter, load_part, one_line_errors, tensor_shapes

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
_NORMS = re.compile(r"(\.(?:query|key)_norm|^distilled_guidance_layer\.norms\.\d+)\.weight$")  # ComfyUI saves FLUX's scales so
_BASE = re.compile(r"base|raw|^z_image_(bf|fp|int)\d")


@dataclass(frozen=True)
class Given:
    """Options for a file of the network alone: files of its other parts, and the published model whose noise schedule it has."""

    text_encoder: str = ""
    vae: str = ""
    schedule: str = ""


NOTHING = Given()


def split_files_pipeline(
    path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype, parts: str | Path = "", given: Given = NOTHING
) -> Any:
    """The diffusers pipeline of a network's file in its original names.

    Text encoder and autoencoder are the given files, those of the folder `parts`, or those in ComfyUI's folders; all are found
    before any is read. The schedule is the one that is given, that of `parts`, or the published model's.
    """
    import diffusers

    folder = Path(parts) if parts else None
    names = [name for name in config.parts if name != family.network_name and name not in family.within]
    files = {name: find_part(path, name, config, getattr(given, name), folder) for name in names}
    if folder is not None and (folder / "scheduler").is_dir() and not given.schedule:
        config = _with_schedule(folder, family, config)
    else:
        config = published_by_name(path, family, config, given.schedule)
    tokenizers = ("tokenizer", *family.more_tokenizers)
    found: dict[str, Any] = {name: find_tokenizer(path, name, config, folder) for name in tokenizers}
    found["scheduler"] = getattr(diffusers, config.scheduler[0]).from_config(config.scheduler[1])
    found |= {name: load_file_part(file, *config.parts[name], dtype) for name, file in files.items()}
    return family.assemble(**found, **config.arguments, **load_in_file(path, family, config, dtype))


def _with_schedule(folder: Path, family: type[DiffusersPolicy], config: ModelConfig) -> ModelConfig:
    scheduler = load_part(folder / "scheduler", ("diffusers", config.scheduler[0]), torch.float32)
    return replace(
        config, scheduler=(config.scheduler[0], dict(scheduler.config)), arguments={**config.arguments, **pipeline_settings(folder, family)}
    )


def published_by_name(path: Path, family: type[DiffusersPolicy], config: ModelConfig, schedule: str) -> ModelConfig:
    """The published model that is meant where several have these shapes: `schedule`, or the one that the file is called after."""
    names = [name for name, other in family.published.items() if other.files == config.files]
    if schedule and schedule not in names:
        raise ValueError(f"schedule = {schedule!r}: {path} may be {' or '.join(names)}")
    if len(names) > 1 and not schedule:
        turbo, base = "turbo" in path.stem.lower(), _BASE.search(path.stem.lower())
        if turbo == bool(base):
            raise ValueError(f"{path} has the shapes of {' and '.join(names)}: say whose noise levels are meant (schedule = {names[-1]})")
        schedule = next(name for name in names if name.endswith("turbo") == turbo)
    return replace(family.published[schedule], parts=config.parts) if schedule else config


def pipeline_settings(folder: Path, family: type[DiffusersPolicy]) -> Config:
    """The settings of a pipeline, which are no components, in a diffusers folder."""
    file = folder / "model_index.json"
    index: Config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {name: value for name, value in index.items() if name in family.settings}


def load_in_file(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The network, and the components that its file holds too."""
    keys = tensor_shapes(path)
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    tensors = {_NORMS.sub(r"\1.scale", key.removeprefix(prefix)): value for key, value in read_scaled(path, dtype, prefix).items()}
    found: dict[str, Any] = {}
    for name, start in family.within.items():
        own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        found[name] = _filled(path, config.parts[name], own)
    part = config.parts[family.network_name]
    with one_line_errors(path):
        state = converter(part[0][1])(tensors)
    return {**found, family.network_name: _filled(path, part, state)}


def _filled(path: Path, part: tuple[PartClass, Config], state: dict[str, Tensor]) -> Any:
    """The module of that class and configuration, with these weights."""
    import diffusers
    from accelerate import init_empty_weights

    (_, kind), settings = part
    cls: Any = getattr(diffusers, kind)
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in cls.from_config(settings).state_dict().items()}
    wrong = [name for name, value in state.items() if wanted.get(name) != value.shape] + [name for name in wanted if name not in state]
    if wrong:
        raise ValueError(f"{path} is not the published {kind}: {len(wrong)} of its weights differ, {wrong[0]} for example")
    with init_empty_weights(include_buffers=False):  # what is computed, as tables of positions, keeps its values
        module = cls.from_config(settings)
    with without_dtype_warning():
        module.load_state_dict(state, assign=True)
    return module
