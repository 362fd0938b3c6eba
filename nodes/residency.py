"""Which weights are live: the tuned model as patches over the base's weights while they are on, or as a second resident model."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.utils
import comfy.weight_adapter
import torch

from . import host
from .same import difference

KEY = "imagerefl_switch"


class Gate:
    """The patches that make the tuned model, off or on for one evaluation; one for all weights of a base, a LoRA and a strength.

    ComfyUI loads a model anew when its `patches_uuid` is another one, so the gate has one: a queue of seeds loads once.
    """

    def __init__(self, base: Any, patches: dict[str, list[tuple[Any, ...]]], strength: float) -> None:
        self.uuid = uuid.uuid4()
        self.weights = {key: GatedWeight(key, [(patch[0] * strength, *patch[1:]) for patch in listed]) for key, listed in patches.items()}
        self._layers: WeakKeyDictionary[Any, tuple[Any, list[Any]]] = WeakKeyDictionary()
        _decide_how(base, self.weights)

    @contextmanager
    def applied(self, network: Any, on: bool) -> Generator[None]:
        """Inside, `network` (BaseModel, one for each GPU) is the tuned model or the base.

        Off, no layer lists a function of ours, so that it takes the path it takes without a switch. On, every layer does,
        also where the loader attaches none: small layers under dynamic VRAM.
        """
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for weight, layer in zip(self.weights.values(), self.layers(network)):
                owner, name = weight.owner(layer)
                own, listed = vars(owner), getattr(owner, name)
                others = [f for f in listed if not isinstance(f, Attached)]
                before.append((own, name, own.get(name)))
                own[name] = [*others, weight.entry(layer, not others)] if on else others
            yield
        finally:
            for own, name, listed in reversed(before):
                if listed is None:
                    own.pop(name, None)  # the class has one
                else:
                    own[name] = listed

    def layers(self, network: Any) -> list[Any]:
        """The layer of each weight; finding them by name takes milliseconds, so once per network."""
        body, layers = self._layers.get(network, (None, []))
        if body is not network.diffusion_model:
            layers = [comfy.utils.get_attr(network, weight.path) for weight in self.weights.values()]
            self._layers[network] = (network.diffusion_model, layers)
        return layers


class GatedWeight:
    """A weight or bias of a layer and the patches that the tuned model has over the base's."""

    own_list = False  # whether the stored tensor itself lists patches

    def __init__(self, key: str, patches: list[tuple[Any, ...]]) -> None:
        self.key, self.patches = key, patches
        self.path, _, self.kind = key.rpartition(".")
        self.copies: dict[torch.device, list[tuple[Any, ...]]] = {}  # of the patches; a device may hold a clone of the model

    def owner(self, layer: Any) -> tuple[Any, str]:
        """What lists the changes of the weight, and the list's name."""
        return (getattr(layer, self.kind), "patches") if self.own_list else (layer, f"{self.kind}_function")

    def entry(self, layer: Any, alone: bool) -> Any:
        """What goes into that list; `alone`: it is the only one there."""
        return (self.patches, self.key) if self.own_list else partial(self.merged, layer, alone)

    def merged(self, layer: Any, alone: bool, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the patches, rounded as ComfyUI rounds a LoRA that it merges into this storage.

        `weight` may be the resident tensor, so it is copied. Where nothing else changes the weight, the stored one is taken:
        `weight` was rounded to the type of the computation already.
        """
        stored = getattr(layer, self.kind)
        source = stored if alone and stored.device == weight.device else weight
        value = source.to(host.lora_dtype(weight.device), copy=True)
        convert = getattr(layer, f"convert_{self.kind}", None)
        if convert is not None:
            value = convert(value, inplace=True)
        value = comfy.lora.calculate_weight(self.on(weight.device), value, self.key)
        if value.shape != weight.shape:
            raise ValueError(f"the tuned model's LoRA changes the shape of {self.key}, which cannot be switched: load another LoRA")
        return host.plain(host.rounded(layer, self.kind, value, host.string_to_seed(self.key)), weight.dtype)

    def on(self, device: torch.device) -> list[tuple[Any, ...]]:
        """The patches on a device: moved there once, not at every evaluation."""
        if device not in self.copies:
            self.copies[device] = _moved(self.patches, device)
        return self.copies[device]


class Attached:
    """What ComfyUI's loader holds: it counts the patches' bytes and moves them with the model, and changes nothing."""

    def __init__(self, gate: Gate, key: str) -> None:
        self.gate, self.key = gate, key

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def move_to(self, device: torch.device) -> int:
        """Bring the patches to the device; returns their bytes."""
        weight = self.gate.weights[self.key]
        weight.copies = {at: moved for at, moved in weight.copies.items() if at == device}
        return 0 if weight.own_list else _bytes(weight.on(device))


_gates: WeakValueDictionary[tuple[Any, ...], Gate] = WeakValueDictionary()  # they live in what is attached to the model


def gated(base: Any, tuned: Any, strength: float) -> tuple[Any, Gate]:
    """A clone of `base`, and the gate to the patches that `tuned` has over it. Both are clones of one model."""
    key = (base.patches_uuid, tuned.patches_uuid, strength)
    extra = extra_patches(base, tuned)
    gate = _gates.get(key)
    if gate is None:
        gate = _gates[key] = Gate(base, extra, strength)
    model = base.clone()
    for name in gate.weights:
        model.add_weight_wrapper(name, Attached(gate, name))
    model.patches_uuid = gate.uuid
    return model, gate


def _moved(value: Any, device: torch.device) -> Any:
    if torch.is_tensor(value):
        return comfy.model_management.cast_to_device(value, device, value.dtype)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        moved = copy.copy(value)
        moved.weights = _moved(value.weights, device)
        return moved
    return value


def _bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return _bytes(value.weights) if isinstance(value, comfy.weight_adapter.WeightAdapterBase) else 0


def _decide_how(base: Any, weights: dict[str, GatedWeight]) -> None:
    """Find by trial how each kind of layer takes patches while it samples, or refuse."""
    tried: dict[tuple[Any, ...], bool | None] = {}
    for key, weight in weights.items():
        layer = comfy.utils.get_attr(base.model, weight.path)
        stored = [(type(p), p.dtype, str(getattr(p, "tensor_type", ""))) for p in layer.parameters(recurse=False)]
        kind = (type(layer), weight.kind, *stored)
        if kind not in tried:
            if host.calls_weight_functions(layer, weight.kind):
                tried[kind] = False
            else:
                tried[kind] = True if host.reads_own_patches(layer, weight.kind) else None
        if tried[kind] is None:
            raise ValueError(
                f"the LoRA changes {key} ({type(layer).__name__}), which cannot be changed while it samples: load the base with "
                "Load Checkpoint or Load Diffusion Model, or use a second checkpoint with the LoRA merged as the tuned model"
            )
        weight.own_list = tried[kind]


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
    if difference(base.object_patches, tuned.object_patches):
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
    return extra


def _changes(patch: tuple[Any, ...]) -> bool:
    """Whether a patch can change its weight; of kinds other than LoRA and plain differences it is assumed."""
    strength, adapter = patch[:2]
    halves = adapter.weights[:2] if isinstance(adapter, comfy.weight_adapter.LoRAAdapter) else ()
    halves = adapter[1][:1] if isinstance(adapter, tuple) and adapter[0] == "diff" else halves
    return strength != 0 and all(bool(half.any()) for half in halves)


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] != b[0] or a[1] is not b[1] or a[2:4] != b[2:4]


# ModelPatcher's attributes that a sampling run takes from the base alone: what the tuned model has there must be the same
_ONE_FOR_BOTH = ("model_options", "wrappers")
_ONE_FOR_CLONES = ("callbacks", "injections", "hook_patches", "additional_models", "weight_wrapper_patches")


def check_same_family(base: Any, tuned: Any) -> None:
    """Refuse models that cannot continue each other's latents, or whose patches cannot both be heeded, and say why."""
    if host.PROBLEM:
        raise ValueError(host.PROBLEM)
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
    for name in (*_ONE_FOR_BOTH, *(_ONE_FOR_CLONES if base.is_clone(tuned) else ())):
        where = difference(getattr(base, name, None), getattr(tuned, name, None))
        if where is not None:
            raise ValueError(
                f"base and tuned model are patched differently ({'.'.join(where) or name}: attention, guidance or sampling patches): "
                "apply that node before the two part, ahead of Load LoRA, or to neither"
            )
