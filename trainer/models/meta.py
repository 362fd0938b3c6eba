"""A policy that has a model's shapes and not its weights: the real code of its family over modules on torch's meta device.

From configurations alone: a diffusers folder's own, a single file's header, or a family's name for a model that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .configs import FAMILIES, Config
from .diffusers_policy import DiffusersPolicy
from .load import BASE_UNET, POLICIES, detect

Parts = dict[str, tuple[tuple[str, str], Config]]


class _Words:
    """A tokenizer that says nothing: every text is as long as it may be."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def tokenize(self, text: str) -> list[str]:
        """No word is one of a textual inversion."""
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        """What the pipeline would say was cut off."""
        return []

    def __call__(self, texts: str | Sequence[str], max_length: int | None = None, **more: Any) -> Any:
        from transformers import BatchEncoding

        shape = (1 if isinstance(texts, str) else len(texts), max_length or 1)
        return BatchEncoding({"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)})


def outline(path: str | Path, dtype: torch.dtype = torch.float32, image_size: int | None = None) -> DiffusersPolicy:
    """The policy of the model at `path`, or of a name of FAMILIES, without values: nothing is loaded.

    Its noise levels are real numbers. Raises ValueError or FileNotFoundError with one sentence.
    """
    import diffusers

    pipeline_name, parts, (scheduler, schedule) = _described(Path(path))
    kind = POLICIES[pipeline_name]
    made: dict[str, Any] = {name: _module(library, config, dtype) for name, (library, config) in parts.items()}
    made["scheduler"] = getattr(diffusers, scheduler).from_config(schedule)
    for name, ((_, encoder), config) in parts.items():
        if name.startswith("text_encoder"):
            made[name.replace("text_encoder", "tokenizer")] = _Words(
                512 if encoder.startswith("T5") else config.get("max_position_embeddings", 77)
            )
    wanted = kind.pipeline_class()
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if name not in made and pipeline_name == "StableDiffusion3Pipeline"}
    policy = kind(wanted(**{**kind.load_arguments(), **absent, **made}), "meta", dtype, image_size or None)
    levels = policy.sigmas

    def sigmas(steps: int) -> Tensor:
        policy.device = torch.device("cpu")
        try:
            return levels(steps)
        finally:
            policy.device = torch.device("meta")

    policy.sigmas = sigmas
    return policy


def _module(library: tuple[str, str], config: Config, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import transformers

    kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library[0]], library[1])
    with torch.device("meta"):
        module = kind.from_config(config) if library[0] == "diffusers" else kind(kind.config_class(**config))
    return nn.Module.to(module, dtype)


def _described(path: Path) -> tuple[str, Parts, tuple[str, Config]]:
    """Name of the pipeline, class and configuration of each part, and of the scheduler."""
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            name = detect(shapes)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    elif (path / BASE_UNET).is_dir():
        name = "sdxl" if (path / "text_encoder_2").is_dir() else "sd15"
    elif (path / "model_index.json").is_file():
        return _folder(path)
    elif str(path) in FAMILIES:
        name = str(path)
    else:
        raise FileNotFoundError(f"no model at {path}: give a diffusers folder, a .safetensors checkpoint, or one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    return family.pipeline, family.parts, family.scheduler


def _folder(path: Path) -> tuple[str, Parts, tuple[str, Config]]:
    index: dict[str, Any] = json.loads((path / "model_index.json").read_text("utf-8"))
    name = str(index["_class_name"])
    if name not in POLICIES:
        raise ValueError(f"{path} is a {name}: known are {', '.join(POLICIES)}")
    parts: Parts = {}
    for part, value in index.items():
        if part in ("unet", "transformer", "vae") or (part.startswith("text_encoder") and value[0]):
            parts[part] = ((value[0], value[1]), json.loads((path / part / "config.json").read_text("utf-8")))
    schedule = json.loads((path / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    return name, parts, (index["scheduler"][1], schedule)
