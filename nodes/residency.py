"""Which weights are live: the tuned model as gated patches over the base's weights, or as a second resident model."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.weight_adapter
import torch

KEY = "imagerefl_switch"


class Gate:
    """Open while the tuned model is to be evaluated. One object per switched MODEL, shared by all its weights."""

    def __init__(self) -> None:
        self.open = False


class GatedPatches:
    """A ComfyUI weight wrapper: the weight as it is, or with the tuned model's extra patches while the gate is open."""

    def __init__(self, key: str, patches: list[tuple[Any, ...]], gate: Gate) -> None:
        self.key, self.patches, self.gate = key, patches, gate

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.gate.open:
            return weight
        # fp32 as in ComfyUI's own merging, so that an always open gate equals the merged LoRA bit for bit
        return comfy.lora.calculate_weight(self.patches, weight.to(torch.float32, copy=True), self.key).to(weight.dtype)

    def move_to(self, device: torch.device) -> int:
        """Bring the patches to the device once, not at every evaluation; returns their bytes."""
        moved, size = [], 0
        for strength, adapter, *rest in self.patches:
            if isinstance(adapter, comfy.weight_adapter.WeightAdapterBase):
                weights = tuple(
                    comfy.model_management.cast_to_device(w, device, w.dtype) if torch.is_tensor(w) else w for w in adapter.weights
                )
                size += sum(w.nbytes for w in weights if torch.is_tensor(w))
                adapter = type(adapter)(adapter.loaded_keys, weights)
            moved.append((strength, adapter, *rest))
        self.patches = moved
        return size


def extra_patches(base: Any, tuned: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The patches that `tuned` has over `base`, per weight. Both are clones of one model, and tuned extends base."""
    extra: dict[str, list[tuple[Any, ...]]] = {}
    for key, patches in tuned.patches.items():
        shared = base.patches.get(key, [])
        if len(shared) > len(patches) or any(_differ(a, b) for a, b in zip(shared, patches)):
            raise ValueError(
                f"the tuned model does not extend the base: their LoRAs differ at {key}; load the reward LoRA last, on top of the base"
            )
        if patches[len(shared) :]:
            extra[key] = patches[len(shared) :]
    missing = set(base.patches) - set(tuned.patches)
    if missing:
        raise ValueError(f"the base has a LoRA that the tuned model lacks ({min(missing)}): load the reward LoRA on top of the base")
    same = base.object_patches.keys() == tuned.object_patches.keys()
    if not same or any(base.object_patches[k] is not tuned.object_patches[k] for k in base.object_patches):
        raise ValueError("base and tuned model have different model patches (sampling settings, say): patch first, then load the LoRA")
    if _attention_patches(base) != _attention_patches(tuned):
        raise ValueError(
            "base and tuned model differ in more than a LoRA (attention patches, FreeU and the like): patch first, then load it"
        )
    for key in extra:
        convert = comfy.model_patcher.get_key_weight(base.model, key)[2]
        if convert is not None:
            raise ValueError(
                f"{key} is stored in a scaled format (fp8): a LoRA cannot be switched on it; load the checkpoint in another dtype"
            )
    return extra


def _attention_patches(model: Any) -> set[str]:
    options = model.model_options.get("transformer_options", {})
    return {f"{kind} {name}" for kind in ("patches", "patches_replace") for name in options.get(kind, {})}


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] != b[0] or a[1] is not b[1] or a[2:4] != b[2:4]


def check_same_family(base: Any, tuned: Any) -> None:
    """Refuse models that cannot continue each other's latents, and say why."""
    formats = [type(m.get_model_object("latent_format")).__name__ for m in (base, tuned)]
    if formats[0] != formats[1]:
        raise ValueError(f"base and tuned model have different latent formats ({formats[0]}, {formats[1]}): use two models of one family")
    flow = [isinstance(m.get_model_object("model_sampling"), comfy.model_sampling.CONST) for m in (base, tuned)]
    if flow[0] != flow[1]:
        raise ValueError("one of base and tuned model is a flow model, the other is not: their noise levels mean different things")
    for key in ("in_channels", "context_dim", "adm_in_channels"):
        sizes = [m.model.model_config.unet_config.get(key) for m in (base, tuned)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"base and tuned model are of different families: {key} is {sizes[0]} and {sizes[1]}")
    unets = [m.model.diffusion_model for m in (base, tuned)]
    if type(unets[0]) is not type(unets[1]):
        raise ValueError(f"base and tuned model are of different families: {type(unets[0]).__name__} and {type(unets[1]).__name__}")
