"""LoRA files: written in the layout that ComfyUI and diffusers both load in full, read in any; every key must match.

Beside them the weight differences of a full fine-tune, which load as LoRAs do (see delta.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.diffusers_policy import TRAINED, DiffusersPolicy
from ..policy import Lora, Trainable
from . import delta
from . import layouts as lora_layouts
from .layouts import Adapter


def save_lora(policy: Trainable, path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter (or `weights` under peft's names, an EMA say), read it back, and check that every key matches.

    The file appears whole or not at all.
    """
    if policy.lora is None:
        raise ValueError("the policy has no adapter to save")
    tensors = lora_tensors(policy, weights)
    alpha = policy.lora.alpha if any(key.endswith(".alpha") for key in tensors) else float(policy.lora.rank)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(policy.lora.rank),
        "ss_network_alpha": str(alpha),
        "imagerefl": json.dumps(metadata, sort_keys=True),
    }

    def check(written: Path) -> None:
        if isinstance(policy, DiffusersPolicy):
            _match(policy, read_adapter(written))

    write_tensors(tensors, path, header, check)


def save_delta(
    policy: DiffusersPolicy, path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> None:
    """Write tuned − base of every weight that changed (`weights` by name instead of the tuned ones: an EMA, say), and check it as above.

    Differences are taken in float32 and stored as `dtype`; bfloat16 is off by at most 2⁻⁸ of each.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        change = (parameter if weights is None else weights[name]).detach() - policy.original[name]
        if bool(change.any()):
            tensors[policy.delta_key(name)] = change.to("cpu", dtype)
    write_tensors(tensors, path, {"imagerefl": json.dumps(metadata, sort_keys=True)}, lambda written: changes_of(policy, written))


def changes_of(policy: DiffusersPolicy, path: Path) -> dict[str, Tensor]:
    """A delta file's differences by the policy's parameter names; every key must be one of the model's, with its shape."""
    tensors = read_lora(path)[0]
    known = {policy.delta_key(name): (name, parameter.shape) for name, parameter in policy.whole_parameters()}
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise ValueError(f"{path} was made for another model: {len(unknown)} of {len(tensors)} weights unknown, first {unknown[0]}")
    for key, change in tensors.items():
        name, shape = known[key]
        if change.shape != shape:
            raise ValueError(f"{path} was made for another model: {name} has shape {tuple(change.shape)}, the model wants {tuple(shape)}")
    return {known[key][0]: change for key, change in tensors.items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str], check: Callable[[Path], object]) -> None:
    """Write a safetensors file, read it back, let `check` look at it, and only then give it its name."""
    partial = path.with_name(path.name + ".partial")
    contiguous = {key: value.contiguous() for key, value in sorted(tensors.items())}
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(contiguous, partial, metadata=dict(header))
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        with safe_open(partial, framework="pt") as file:
            if set(file.keys()) != set(tensors) or any(not torch.equal(file.get_tensor(k), v) for k, v in contiguous.items()):
                raise OSError("what was written does not read back; is the disk full?")
        check(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def lora_tensors(policy: Trainable, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter (or `weights` under peft's names) as a file holds it: float32 on the CPU.

    With an alpha per module, or, in diffusers' layout, with the scale inside B: diffusers refuses an alpha for SD3.
    """
    rank, alpha = (policy.lora.rank, policy.lora.alpha) if policy.lora else (1, 1.0)
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        key = policy.file_key(name)
        value = (parameter if weights is None else weights[name]).detach().float().cpu()
        inside = key.startswith("transformer.")
        tensors[key] = value * (alpha / rank) if inside and ".lora_B." in key else value
        if not inside:
            tensors[key.rsplit(".lora_", 1)[0] + ".alpha"] = torch.tensor(float(alpha))
    return tensors


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors, our metadata ({} for foreign files) and the whole header of a LoRA file."""
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    return tensors, json.loads(header.get("imagerefl", "{}")), header


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_adapter(path: Path) -> Adapter:
    """A LoRA file in any known layout, or a peft folder; raises ValueError with one clear line for anything else."""
    path = path / PEFT_WEIGHTS if path.is_dir() else path
    tensors, _, header = read_lora(path)
    settings: dict[str, Any] = {}
    if path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file():
        settings = json.loads(path.with_name(PEFT_CONFIG).read_text("utf-8"))
    elif "lora_adapter_metadata" in header:  # diffusers' own: peft's configuration, each key behind the denoiser's name
        settings = {k.split(".", 1)[1]: v for k, v in json.loads(header["lora_adapter_metadata"]).items() if not k.startswith("text_")}
    if settings.get("use_dora"):
        raise ValueError(f"{path} holds more than plain LoRA: DoRA")

    def alpha_of(name: str, rank: int) -> float:
        """peft's rule: the first pattern that the name ends with, else the common alpha."""
        patterns: dict[str, float] = settings.get("alpha_pattern") or {}
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = float(next(found, settings.get("lora_alpha") or rank))
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    try:
        if delta.is_delta(tensors):
            raise ValueError("holds a full fine-tune's weight differences, no LoRA: `python -m trainer convert` extracts one")
        return lora_layouts.parse(tensors, alpha_of)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def load_lora(policy: DiffusersPolicy, path: Path, strength: float = 1.0) -> dict[str, Any]:
    """Attach the LoRA of a file in any known layout, scaled by `strength`, to a policy without adapter; every key must match.

    Modules may differ in rank and alpha: they are brought to the highest rank, filled with zeros, and stay the same
    function. A full fine-tune's differences are added to a second version of the weights. Returns the file's metadata.
    """
    if not path.is_dir():
        tensors, metadata, _ = read_lora(path)
        if delta.is_delta(tensors) or (metadata and not tensors):  # nothing may have changed
            changes = changes_of(policy, path)
            with torch.no_grad():
                for name, parameter in policy.add_version(changes).items():
                    parameter.copy_(parameter.float() + strength * changes[name].to(policy.device, torch.float32))
            return metadata

    def attach(lora: Lora) -> Mapping[str, nn.Parameter]:
        policy.add_lora(lora)
        return dict(policy.named_parameters())

    return _load(policy, path, strength, TRAINED, attach)


def load_consistency(policy: DiffusersPolicy, path: Path) -> dict[str, Any]:
    """Attach a consistency LoRA (LCM-LoRA, arXiv:2311.05556) as the frozen state `consistency`; every key must match."""
    return _load(policy, path, 1.0, "consistency", policy.add_consistency)


def _load(
    policy: DiffusersPolicy, path: Path, strength: float, name_of_adapter: str, attach: Callable[[Lora], Mapping[str, nn.Parameter]]
) -> dict[str, Any]:
    adapter = read_adapter(path)
    try:
        _fits(policy, adapter)
        same = {(u.rank, u.alpha) for u in adapter.updates.values()}
        rank = max(r for r, _ in same)
        alpha = next(iter(same))[1] if len(same) == 1 else float(rank)
        parameters = attach(Lora(rank, alpha, tuple(sorted(adapter.updates))))
        with torch.no_grad():
            for name, update in adapter.updates.items():
                down, up = (update.down, update.up) if len(same) == 1 else update.padded(rank)
                parameters[f"{name}.lora_A.{name_of_adapter}.weight"].copy_(down)
                parameters[f"{name}.lora_B.{name_of_adapter}.weight"].copy_(up * strength)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return read_lora(path / PEFT_WEIGHTS if path.is_dir() else path)[1]


def _fits(policy: DiffusersPolicy, adapter: Adapter) -> None:
    """Refuse an adapter of another model, before anything is touched."""
    if adapter.left_out:
        raise ValueError(
            f"also adapts text encoders ({len(adapter.left_out)} modules), which stay as they are here: "
            "`python -m trainer convert` leaves them out"
        )
    modules = policy.adaptable()
    unknown = sorted(set(adapter.updates) - set(modules))
    if unknown:
        raise ValueError(f"was made for another model: {len(unknown)} of {len(adapter.updates)} modules unknown, first {unknown[0]}")
    for name, update in adapter.updates.items():
        wanted, given = tuple(modules[name].weight.shape), (update.up.shape[0], *update.down.shape[1:])
        if given != wanted:
            raise ValueError(f"was made for another model: {name} has shape {given}, the model wants {wanted}")


def _match(policy: DiffusersPolicy, adapter: Adapter) -> None:
    """Refuse a written file that does not hold exactly the policy's modules, each in its shape."""
    _fits(policy, adapter)
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters()}
    odd = sorted(adapted ^ set(adapter.updates))
    if odd:
        raise OSError(f"{len(odd)} keys of the written file do not match the model, first {odd[0]}")


def write_adapter(adapter: Adapter, path: Path, layout: str, header: Mapping[str, str]) -> None:
    """Write an adapter in one of lora_layouts.LAYOUTS; what reads back must be the same updates. peft's is a folder."""
    tensors = {"kohya": lora_layouts.kohya, "diffusers": lora_layouts.diffusers, "peft": lora_layouts.peft}[layout](adapter)
    if layout == "peft":
        path.mkdir(parents=True, exist_ok=True)
        _peft_config(adapter).save_pretrained(path)
        path = path / PEFT_WEIGHTS
    else:
        ranks = {u.rank for u in adapter.updates.values()}
        header = {**header, "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks))}
    header = {key: value for key, value in header.items() if key != "lora_adapter_metadata"}  # it described the old layout

    def check(written: Path) -> None:
        back = lora_layouts.parse(read_lora(written)[0]).updates
        if set(back) != set(adapter.updates):
            raise OSError(f"{path}: what was written does not read back as the same modules")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, path, header, check)


def _peft_config(adapter: Adapter) -> Any:
    from peft import LoraConfig

    def pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
        common = max(set(values.values()), key=list(values.values()).count)
        return common, {f"^{re.escape(n)}": v for n, v in values.items() if v != common}

    rank, ranks = pattern({n: u.rank for n, u in adapter.updates.items()})
    alpha, alphas = pattern({n: u.alpha for n, u in adapter.updates.items()})
    chosen: Any = {"r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas}
    return LoraConfig(**chosen, target_modules=list(adapter.updates))
