"""A policy whose weights have shapes and no values: the family's own code over modules on torch's meta device.

Built from configurations alone: of a diffusers folder, of a single file's family, or of a published model by name.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configs import Config, ModelConfig
from .diffusers_policy import DiffusersPolicy
from .load import INDICES, MODELS, resolve
from .quantisation import NONE, Quantisation, quantise_meta
from .split_files import pipeline_settings

_TEMPLATE = re.compile(r"<\|\w+\|>|\w+|[^\w ]")  # of Qwen's chat templates: markers, words, line breaks


class StubTokenizer:
    """Every prompt has max_length tokens; a text without that limit is a part of a template."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def tokenize(self, text: str) -> list[str]:
        """No token names a textual inversion."""
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        """The truncated text, which pipelines log."""
        return []

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **more: Any) -> str:
        """The message without its template."""
        return messages[0]["content"]

    def __call__(self, texts: str | Sequence[str], max_length: int | None = None, **more: Any) -> Any:
        from transformers import BatchEncoding

        rows = [texts] if isinstance(texts, str) else texts
        template = max((len(_TEMPLATE.findall(row)) for row in rows), default=0)
        shape = (len(rows), max_length or max(1, template))
        return BatchEncoding({"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)})


def meta_policy(
    path: str | Path, dtype: torch.dtype = torch.float32, image_size: int | None = None, quantisation: Quantisation = NONE
) -> DiffusersPolicy:
    """The policy of the model at `path`, or of a name in MODELS, on the meta device; no weights are read.

    Noise levels are real numbers, as they are always on the CPU. Raises ValueError or FileNotFoundError with one line.
    """
    import diffusers

    quantisation.check(torch.device("meta"))
    family, config = _described(Path(path))
    parts: dict[str, Any] = {name: _module(library, settings, dtype) for name, (library, settings) in config.parts.items()}
    for name, (_, settings) in config.parts.items():
        if kind := quantisation.kind(name):
            quantise_meta(parts[name], kind)
        if name.startswith("text_encoder"):
            length = 512 if name == config.t5 else settings.get("max_position_embeddings", 77)
            parts[name.replace("text_encoder", "tokenizer")] = StubTokenizer(length)
    parts |= {name: StubTokenizer(512) for name in family.more_tokenizers}
    parts["scheduler"] = getattr(diffusers, config.scheduler[0]).from_config(config.scheduler[1])
    absent = {kind: None for name in family.optional if name not in parts for kind in (name, name.replace("text_encoder", "tokenizer"))}
    pipeline = family.assemble(**{**family.arguments, **config.arguments, **absent, **parts})
    return family(pipeline, "meta", dtype, image_size or None)


def _module(library: tuple[str, str], config: Config, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import transformers

    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library[0]], library[1])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of parts that a family's class uses
        module = cls.from_config(config) if library[0] == "diffusers" else cls(cls.config_class(**config))
    return nn.Module.to(module, dtype)


@lru_cache(maxsize=64)
def denoiser_modules(model: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the linear and convolutional modules, by name, of a model's denoiser; no weights are read.

    `model`: a diffusers folder, of a whole model or of its denoiser, a single-file checkpoint, or a name in MODELS.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        config: Config = json.loads((path / "config.json").read_text("utf-8"))
        network = _module(("diffusers", str(config["_class_name"])), config, torch.float32)
    else:
        family, described = _described(path)
        network = _module(*described.parts[family.network_name], torch.float32)
    adaptable = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {name: tuple(module.weight.shape) for name, module in adaptable}


def _described(path: Path) -> tuple[type[DiffusersPolicy], ModelConfig]:
    if not path.exists():
        if str(path) in MODELS:
            return MODELS[str(path)]
        raise FileNotFoundError(f"no model at {path}: give a diffusers folder, a .safetensors checkpoint, or one of {', '.join(MODELS)}")
    family, config = resolve(path)
    return family, config or _folder_config(path, family)


def _folder_config(path: Path, family: type[DiffusersPolicy]) -> ModelConfig:
    def read(name: str) -> Any:
        return json.loads((path / name).read_text("utf-8"))

    index: dict[str, Any] = read(next(name for name in INDICES if (path / name).is_file()))
    parts = {
        part: ((value[0], value[1]), read(f"{part}/config.json"))
        for part, value in index.items()
        if part in ("unet", "transformer", "vae") or (part.startswith("text_") and isinstance(value, list) and isinstance(value[0], str))
    }
    arguments = pipeline_settings(path, family)
    return ModelConfig(parts, (index["scheduler"][1], read("scheduler/scheduler_config.json")), arguments=arguments)
