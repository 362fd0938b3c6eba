"""LoRA files: saved in the layout that ComfyUI and diffusers both load in full, loaded from any; every key must match.

The weight differences of full fine-tuning are saved and loaded the same way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..policy import Adaptable, Trainable
from ..runtime.files import write_text
from . import cosmos, names
from .attach import attach_adapter
from .layouts import Adapter, Update, parse, tensors_of
from .write import write_tensors

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")  # peft's initialisations whose adapters belong to other weights than the base's
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


# -- saving ------------------------------------------------------------------------------------------------------------


def save_lora(
    policy: Trainable, path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None, adapter: str = "tuned"
) -> None:
    """Write a trained adapter (or `weights` by peft's names, such as an EMA), read it back, and check that every key matches.

    A crash leaves no partial file. Raises ValueError without an adapter, OSError where the file cannot be written or read back.
    """
    if policy.lora is None:
        raise ValueError("the policy has no adapter to save")
    saved, layout = adapter_of(policy, weights, adapter), policy.lora_layout
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(policy.lora.rank),
        "ss_network_alpha": str(float(policy.lora.rank) if layout in names.SCALED else policy.lora.alpha),
        "imagerefl": json.dumps(metadata, sort_keys=True),
    }

    def check(written: Path) -> None:
        if layout != "native":  # the network's own names are not diffusers' names, which reading gives
            _check_modules(written, saved)

    write_tensors(tensors_of(saved, layout), path, header, check)


def adapter_of(policy: Trainable, weights: Mapping[str, Tensor] | None = None, adapter: str = "tuned") -> Adapter:
    """A trained adapter (or `weights` by peft's names), float32 on the CPU."""
    assert policy.lora is not None
    halves: dict[str, dict[str, Tensor]] = {}
    for name, parameter in policy.named_parameters():
        if names.adapter_of_parameter(name) != adapter:
            continue
        module, half = names.of_parameter(name)
        halves.setdefault(module, {})[half] = (parameter if weights is None else weights[name]).detach().float().cpu()
    return Adapter({module: Update(pair["down"], pair["up"], policy.lora.alpha) for module, pair in halves.items()})


def lora_tensors(policy: Trainable, weights: Mapping[str, Tensor] | None = None, adapter: str = "tuned") -> dict[str, Tensor]:
    """What `save_lora` writes."""
    return tensors_of(adapter_of(policy, weights, adapter), policy.lora_layout)


def save_delta(
    policy: Adaptable, path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> None:
    """Write tuned − base of every weight that changed (`weights` by name instead of the tuned ones, such as an EMA), and check it.

    Differences are taken in float32 and stored as `dtype`; bfloat16 rounds each by at most 2⁻⁸ of it.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        change = (parameter if weights is None else weights[name]).detach() - policy.adapters.original[name]
        if bool(change.any()):
            tensors[names.delta_key(name)] = change.to("cpu", dtype)
    header = {"imagerefl": json.dumps(metadata, sort_keys=True)}
    write_tensors(tensors, path, header, lambda written: _checked_changes(policy, read_lora(written)[0], written))


def write_adapter(adapter: Adapter, path: Path, layout: str, header: Mapping[str, str]) -> None:
    """Write an adapter in one of layouts.LAYOUTS and check that the same modules read back. A peft layout is a folder."""
    layout = "original" if layout == "diffusers" and cosmos.is_cosmos(adapter.updates) else layout  # which diffusers reads too
    if layout == "kohya" and adapter.root != "unet":
        raise ValueError("kohya's names for transformers are of fused projections: use --to diffusers, which ComfyUI loads too")
    header = {key: value for key, value in header.items() if key != "lora_adapter_metadata"}  # it described the old layout
    if layout == "peft":
        path.mkdir(parents=True, exist_ok=True)
        (path / PEFT_WEIGHTS).unlink(missing_ok=True)  # a folder without weights is unfinished; none mixes two adapters
        try:
            with TemporaryDirectory() as folder:
                _peft_config(adapter).save_pretrained(folder)
                text = (Path(folder) / PEFT_CONFIG).read_text("utf-8")
        except OSError as error:
            raise OSError(f"cannot write {path / PEFT_CONFIG}: {error}") from error
        write_text(text, path / PEFT_CONFIG)
        path = path / PEFT_WEIGHTS
    else:
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": str(max(u.rank for u in adapter.updates.values()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors_of(adapter, layout), path, header, lambda written: _check_modules(written, adapter))


def _peft_config(adapter: Adapter) -> Any:
    from peft import LoraConfig

    def pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
        common = max(set(values.values()), key=list(values.values()).count)
        return common, {f"^{re.escape(n)}": v for n, v in values.items() if v != common}

    rank, ranks = pattern({n: u.rank for n, u in adapter.updates.items()})
    alpha, alphas = pattern({n: u.alpha for n, u in adapter.updates.items()})
    chosen: Any = {"r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas}
    return LoraConfig(**chosen, target_modules=list(adapter.updates))


def _check_modules(written: Path, adapter: Adapter) -> None:
    """Raise OSError unless the file reads back as the same updates of the same modules."""
    found = read_adapter(written).updates
    different = sorted(set(found) ^ set(adapter.updates)) or [
        name for name, update in adapter.updates.items() if not update.equals(found[name])
    ]
    if different:
        raise OSError(f"{len(different)} modules of the written file do not match the adapter, first {different[0]}")


# -- reading -----------------------------------------------------------------------------------------------------------


def lora_weights(path: Path) -> Path:
    """The file with the weights of a LoRA: a peft folder's, or the file itself."""
    return path / PEFT_WEIGHTS if path.is_dir() else path


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors, our metadata ({} of foreign files) and the whole header of a LoRA file or peft folder."""
    path = lora_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, _object(header.get("imagerefl", "{}"), f"{path}, metadata `imagerefl`"), header


def _object(text: str, source: str) -> dict[str, Any]:
    """A JSON object; ValueError that names its source for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is not a JSON object")
    return cast(dict[str, Any], value)


def read_metadata(path: Path) -> dict[str, Any]:
    """Our metadata of a LoRA file or peft folder, {} of foreign files; no tensor is read."""
    path = lora_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return _object(header.get("imagerefl", "{}"), f"{path}, metadata `imagerefl`")


def read_adapter(path: Path) -> Adapter:
    """A LoRA file of any known layout, or a peft folder; raises ValueError with one line for anything else."""
    path = lora_weights(path)
    tensors, _, header = read_lora(path)
    return _adapter(tensors, header, path)


def _adapter(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> Adapter:
    settings: dict[str, Any] = {}
    if path.name.removesuffix(".partial") == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file():
        settings = _object(path.with_name(PEFT_CONFIG).read_text("utf-8"), str(path.with_name(PEFT_CONFIG)))
    elif "lora_adapter_metadata" in header:  # diffusers' own: peft's configuration, each key after the denoiser's name
        given = _object(header["lora_adapter_metadata"], f"{path}, metadata `lora_adapter_metadata`")
        settings = {k.partition(".")[2]: v for k, v in given.items() if not k.startswith("text_")}
    if settings.get("use_dora"):
        raise ValueError(f"{path} holds more than plain LoRA: DoRA")

    patterns: Any = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path} has an alpha_pattern in {PEFT_CONFIG} which is not a table of names and numbers")
    if str(settings.get("init_lora_weights", "")).lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path} was initialised by {settings['init_lora_weights']}, which changes the base model: save it again with peft's "
            "path_initial_model_for_weight_conversion"
        )

    def alpha_of(name: str, rank: int) -> float:
        """peft's rule: the first pattern that the name ends with, else the common alpha."""
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = next(found, settings.get("lora_alpha"))
        alpha = rank if alpha is None else alpha
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"has the alpha {alpha!r} for {name} in {PEFT_CONFIG}: expected a finite number")
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    try:
        if names.is_delta(tensors):
            raise ValueError("holds full weight differences, not a LoRA: `python -m trainer convert` extracts one")
        return parse(tensors, alpha_of)
    except (ValueError, re.error) as error:  # alpha_pattern is of regular expressions
        raise ValueError(f"{path} {error}") from error


# -- loading into a policy ---------------------------------------------------------------------------------------------


def load_lora(policy: Adaptable, path: Path, strength: float = 1.0, adapter: str = "tuned") -> dict[str, Any]:
    """Attach the LoRA of a file of any known layout, scaled by `strength`, as the adapter of that name; every key must match.

    Modules may differ in rank and alpha: they are padded with zeros to the highest rank. Full weight differences are added
    to another version of the weights. Returns the file's metadata.
    """
    tensors, metadata, header = read_lora(path)
    if names.is_delta(tensors) or (metadata and not tensors):  # after training that changed nothing the file is empty
        changes = _checked_changes(policy, tensors, path)
        with torch.no_grad():
            for name, parameter in policy.adapters.tune_weights(changes, adapter).items():
                parameter.copy_(parameter.float() + strength * changes[name].to(policy.device, torch.float32))
        return metadata

    attach_adapter(policy, _adapter(tensors, header, lora_weights(path)), path, strength, adapter)
    return metadata


def load_consistency(policy: Adaptable, path: Path) -> None:
    """Attach a consistency LoRA (LCM-LoRA, arXiv:2311.05556) as the frozen adapter `consistency`; every key must match."""
    attach_adapter(policy, read_adapter(path), path, 1.0, "consistency")


def load_training_adapter(policy: Adaptable, path: Path) -> None:
    """Attach the LoRA that undoes a model's distillation while it trains; every key must match. See models/adapters.py."""
    attach_adapter(policy, read_adapter(path), path, 1.0, "training_adapter")


def _checked_changes(policy: Adaptable, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A delta file's differences by parameter name; raises ValueError for a name or shape that the model does not have."""
    known = {names.delta_key(name): (name, parameter.shape) for name, parameter in policy.adapters.network_weights().items()}
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise ValueError(f"{path} was made for another model: {len(unknown)} of {len(tensors)} weights unknown, first {unknown[0]}")
    changes: dict[str, Tensor] = {}
    for key, change in tensors.items():
        name, shape = known[key]
        if change.shape[:2] != shape[:2] or change.numel() != shape.numel():  # a 1×1 kernel is a matrix
            raise ValueError(f"{path} was made for another model: {name} has shape {tuple(change.shape)}, the model expects {tuple(shape)}")
        if not bool(change.isfinite().all()):
            raise ValueError(f"{path} is damaged: {key} has values that are not finite")
        changes[name] = change.reshape(shape)
    return changes
