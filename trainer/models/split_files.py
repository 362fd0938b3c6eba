"""Models whose parts are files of their own: a checkpoint of the network alone, and a folder for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .configs import Config, ModelConfig
from .diffusers_policy import DiffusersPolicy, without_dtype_warning
from .quantised import read_scaled
from .single_file import converter, load_part, one_line_errors, tensor_shapes

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def split_files_pipeline(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype, parts: str | Path = "") -> Any:
    """The diffusers pipeline of a network's file in its original names; text encoder, tokenizer, VAE and schedule are those of `parts`."""
    others = [name for name in config.parts if name != family.network_name]
    if not parts:
        raise ValueError(f"{path} holds no {', '.join(others)} and no tokenizer: name a diffusers folder that has them (parts = FOLDER)")
    folder = Path(parts)
    found = {name: load_part(folder / name, config.parts[name][0], dtype) for name in others}
    for name in others:
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            found[tokenizer] = load_part(folder / tokenizer, ("transformers", "AutoTokenizer"), dtype)
    found["scheduler"] = load_part(folder / "scheduler", ("diffusers", config.scheduler[0]), dtype)
    settings = {**config.arguments, **pipeline_settings(folder, family)}
    return family.pipeline_class()(**found, **settings, **{family.network_name: load_network(path, family, config, dtype)})


def pipeline_settings(folder: Path, family: type[DiffusersPolicy]) -> Config:
    """The settings of a pipeline, which are no components, in a diffusers folder."""
    file = folder / "model_index.json"
    index: Config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {name: value for name, value in index.items() if name in family.settings}


def load_network(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype) -> Any:
    import diffusers
    from accelerate import init_empty_weights

    (_, kind), settings = config.parts[family.network_name]
    keys = tensor_shapes(path)
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    tensors = {key.removeprefix(prefix): value for key, value in read_scaled(path, dtype, prefix).items()}
    cls: Any = getattr(diffusers, kind)
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in cls.from_config(settings).state_dict().items()}
    convert = converter(kind)
    with one_line_errors(path):
        state = convert(tensors)
    wrong = [name for name, value in state.items() if wanted.get(name) != value.shape] + [name for name in wanted if name not in state]
    if wrong:
        raise ValueError(f"{path} is not the published {kind}: {len(wrong)} of its weights differ, {wrong[0]} for example")
    with init_empty_weights(include_buffers=False):  # what is computed, as tables of positions, keeps its values
        network = cls.from_config(settings)
    with without_dtype_warning():
        network.load_state_dict(state, assign=True)
    return network
