"""Which weights are live: the tuned model as gated patches over the base's weights, or as a second resident model."""

from __future__ import annotations

import uuid
from typing import Any
from weakref import WeakValueDictionary

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.utils
import comfy.weight_adapter
import torch

KEY = "imagerefl_switch"


class Gate:
    """Open while the tuned model is to be evaluated; one for all weights of a base, a LoRA and a strength.

    ComfyUI loads a model anew when its `patches_uuid` is another one, so the gate carries one: a queue of seeds loads once.
    """

    def __init__(self) -> None:
        self.open = False
        self.uuid = uuid.uuid4()


_gates: WeakValueDictionary[tuple[Any, ...], Gate] = WeakValueDictionary()  # they live in the weights that hold them


def gated(base: Any, tuned: Any, strength: float) -> tuple[Any, Gate]:
    """A clone of `base` with the patches that `tuned` has over it behind a gate. Both are clones of one model."""
    gate = _gates.setdefault((base.patches_uuid, tuned.patches_uuid, strength), Gate())
    model = base.clone()
    for key, patches in extra_patches(base, tuned).items():
        weighted = [(patch[0] * strength, *patch[1:]) for patch in patches]
        model.add_weight_wrapper(key, GatedPatches(key, weighted, gate))
    model.patches_uuid = gate.uuid
    return model, gate


class GatedPatches:
    """A ComfyUI weight wrapper: the weight as it is, or with the tuned model's extra patches while the gate is open."""

    def __init__(self, key: str, patches: list[tuple[Any, ...]], gate: Gate) -> None:
        self.key, self.patches, self.gate = key, patches, gate

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.gate.open:
            return weight
        # fp32 as in ComfyUI's own merging, so that an always open gate equals the merged LoRA bit for bit;
        # in place, since weight functions are given a copy
        return comfy.lora.calculate_weight(self.patches, weight.to(torch.float32), self.key).to(weight.dtype)

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
            elif isinstance(adapter, tuple) and adapter[0] == "diff":
                change = comfy.model_management.cast_to_device(adapter[1][0], device, adapter[1][0].dtype)
                size += change.nbytes
                adapter = ("diff", (change, *adapter[1][1:]))
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
    if not any(_changes(patch) for patches in extra.values() for patch in patches):
        raise ValueError(
            "the tuned model equals the base: load the reward LoRA on it"
            if not extra
            else "the tuned model's LoRA changes nothing: its weights or its strength are zero; load another, or raise the strength"
        )
    for key in extra:
        module, _, kind = key.rpartition(".")
        if not hasattr(comfy.utils.get_attr(base.model, module), f"{kind}_function"):
            raise ValueError(f"the LoRA changes {key}, which ComfyUI cannot change while it samples: merge it into a second checkpoint")
        convert = comfy.model_patcher.get_key_weight(base.model, key)[2]
        if convert is not None:
            raise ValueError(
                f"{key} is stored in a scaled format (fp8): a LoRA cannot be switched on it; load the checkpoint in another dtype"
            )
    return extra


def _attention_patches(model: Any) -> set[str]:
    options = model.model_options.get("transformer_options", {})
    return {f"{kind} {name}" for kind in ("patches", "patches_replace") for name in options.get(kind, {})}


def _changes(patch: tuple[Any, ...]) -> bool:
    """Whether a patch can change its weight; of kinds other than LoRA and plain differences it is assumed."""
    strength, adapter = patch[:2]
    halves = adapter.weights[:2] if isinstance(adapter, comfy.weight_adapter.LoRAAdapter) else ()
    halves = adapter[1][:1] if isinstance(adapter, tuple) and adapter[0] == "diff" else halves
    return strength != 0 and all(bool(half.any()) for half in halves)


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] != b[0] or a[1] is not b[1] or a[2:4] != b[2:4]


def check_same_family(base: Any, tuned: Any) -> None:
    """Refuse models that cannot continue each other's latents, or whose patches cannot both be heeded, and say why."""
    for which, model in (("base", base), ("tuned", tuned)):
        if model.get_wrappers(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY):
            raise ValueError(f"the {which} model is a switch already: connect the model that went into that switch")
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
    # one set of options goes through a sampling run: what only one of the two has would be lost, or reach both
    if _attention_patches(base) != _attention_patches(tuned):
        raise ValueError("base and tuned model have different attention patches (FreeU, IP-Adapter and the like): give both the same")
