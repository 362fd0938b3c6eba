"""Models whose parts are files of their own: a checkpoint of the network alone, and a folder for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configs import Config, ModelConfig, PartClass
from .diffusers_policy import DiffusersPolicy, without_dtype_warning
from .quantised import read_scaled
from .single_file import converter, load_part, one_line_errors, tensor_shapes

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")


def split_files_pipeline(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype, parts: str | Path = "") -> Any:
    """The diffusers pipeline of a network's file in its original names; what the file lacks is that of `parts`."""
    others = [name for name in config.parts if name != family.network_name and name not in family.within]
    if not parts:
        raise ValueError(f"{path} holds no {', '.join(others)} and no tokenizer: name a diffusers folder that has them (parts = FOLDER)")
    folder = Path(parts)
    found = {name: load_part(folder / name, config.parts[name][0], dtype) for name in others}
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in others if name.startswith("text_encoder")]
    for name in (*tokenizers, *family.more_tokenizers):
        found[name] = load_part(folder / name, ("transformers", "AutoTokenizer"), dtype)
    found["scheduler"] = load_part(folder / "scheduler", ("diffusers", config.scheduler[0]), dtype)
    settings = {**config.arguments, **pipeline_settings(folder, family)}
    return family.assemble(**found, **settings, **load_in_file(path, family, config, dtype))


def pipeline_settings(folder: Path, family: type[DiffusersPolicy]) -> Config:
    """The settings of a pipeline, which are no components, in a diffusers folder."""
    file = folder / "model_index.json"
    index: Config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {name: value for name, value in index.items() if name in family.settings}


def load_in_file(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The network, and the components that its file holds too."""
    keys = tensor_shapes(path)
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    tensors = {key.removeprefix(prefix): value for key, value in read_scaled(path, dtype, prefix).items()}
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
