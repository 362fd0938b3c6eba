"""A gate for patches: one set of resident weights, and lists of patches that are on or off at each evaluation of the network."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.lora
import comfy.model_management
import comfy.utils
import comfy.weight_adapter
import torch

from . import host

Patches = Mapping[str, list[tuple[Any, ...]]]
"""ComfyUI's patches, by the key of the weight that they change."""
On = tuple[int, ...]
"""Which adapters of a gate are on, as ascending indices."""


class Gate:
    """Adapters over the weights of a model, each on or off for one evaluation.

    ComfyUI loads a model anew when its `patches_uuid` is another one, so the gate has one: a queue of seeds loads once.
    """

    def __init__(self, model: Any, adapters: Sequence[Patches]) -> None:
        self.uuid = uuid.uuid4()
        keys = dict.fromkeys(key for patches in adapters for key in patches)
        self.weights = {key: GatedWeight(key, [list(patches.get(key, ())) for patches in adapters]) for key in keys}
        self.kept: dict[torch.device, Kept] | None = None  # outside of a sampling run nothing is kept
        self._layers: WeakKeyDictionary[Any, tuple[tuple[Any, ...], list[Any]]] = WeakKeyDictionary()
        _decide_how(model, self.weights)

    @contextmanager
    def applied(self, network: Any, on: On, x: torch.Tensor | None = None) -> Generator[None]:
        """Inside, `network` (BaseModel, one for each GPU) has the adapters `on`; x is what it is about to evaluate.

        With no adapter on, no layer lists a function of ours, so that it takes the path it takes without a gate. Otherwise every
        layer that they change does, also where the loader attaches none: small layers under dynamic VRAM.
        """
        kept = None if self.kept is None or x is None else self.kept.setdefault(x.device, Kept())
        if kept is not None and on:
            kept.make_room(network, x)
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for weight, layer in zip(self.weights.values(), self.layers(network)):
                owner, name = weight.owner(layer)
                own, listed = vars(owner), getattr(owner, name)
                others = [f for f in listed if not isinstance(f, Attached)]
                before.append((own, name, own.get(name)))
                own[name] = [*others, *weight.entries(layer, on, kept, alone=not others)]
            yield
        finally:
            for own, name, listed in reversed(before):
                if listed is None:
                    own.pop(name, None)  # the class has one
                else:
                    own[name] = listed

    @contextmanager
    def sampling(self, model: Any) -> Generator[None]:
        """Inside, patched weights are computed once and kept beside the base's, as far as the free memory of their device allows."""
        before = self.kept
        # streamed weights leave no memory unused, and hooks change the stored weights from one conditioning to the next
        self.kept = None if getattr(model, "is_dynamic", bool)() or model.hook_patches else {}
        try:
            yield
        finally:
            self.kept = before

    def layers(self, network: Any) -> list[Any]:
        """The layer of each weight; finding them by name takes milliseconds, so once per network."""
        # an object patch may have put another layer into the place of one
        patched = getattr(getattr(network, "current_patcher", None), "object_patches", {})
        parts = (network.diffusion_model, *patched.values())
        known, layers = self._layers.get(network, ((), []))
        if len(known) != len(parts) or any(a is not b for a, b in zip(known, parts)):
            layers = [comfy.utils.get_attr(network, weight.path) for weight in self.weights.values()]
            self._layers[network] = (parts, layers)
        return layers


class Kept:
    """Patched weights on one device, for one sampling run."""

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], torch.Tensor] = {}
        self.spare: int | None = None  # bytes that may still be kept

    def make_room(self, network: Any, x: torch.Tensor) -> None:
        """Find at the first evaluation what may be kept, once the model is loaded and sampling is about to take its own memory."""
        if self.spare is None:
            management = comfy.model_management
            # ComfyUI evaluates conditionings together while 1.5 times their memory is free: that must stay so
            needed = 2 * network.memory_required(list(x.shape)) + management.minimum_inference_memory()
            self.spare = int(management.get_free_memory(x.device) - needed)

    def keep(self, name: tuple[Any, ...], value: torch.Tensor) -> None:
        """Keep a weight under its name (adapters, key, type), in the place of those of other adapters if there is too little memory."""
        spare = self.spare or 0
        if value.nbytes > spare:
            for other in [other for other in self.values if other[0] != name[0]]:
                spare += self.values.pop(other).nbytes
        if value.nbytes <= spare:
            self.values[name] = value
            spare -= value.nbytes
        self.spare = spare


class GatedWeight:
    """A weight or bias of a layer, and the patches of each adapter over it."""

    own_list = False  # whether the stored tensor itself lists patches

    def __init__(self, key: str, patches: list[list[tuple[Any, ...]]]) -> None:
        self.key, self.patches = key, patches
        self.path, _, self.kind = key.rpartition(".")
        self.copies: dict[torch.device, list[list[tuple[Any, ...]]]] = {}  # of the patches; a device may hold a clone of the model

    def owner(self, layer: Any) -> tuple[Any, str]:
        """What lists the changes of the weight, and the list's name."""
        return (getattr(layer, self.kind), "patches") if self.own_list else (layer, f"{self.kind}_function")

    def entries(self, layer: Any, on: On, kept: Kept | None, *, alone: bool) -> list[Any]:
        """What goes into that list. alone: nothing else is there."""
        if not any(self.patches[i] for i in on):
            return []
        return [(self.of(self.patches, on), self.key) if self.own_list else partial(self.merged, layer, on, kept, alone)]

    @staticmethod
    def of(patches: list[list[tuple[Any, ...]]], on: On) -> list[tuple[Any, ...]]:
        """The patches of the adapters that are on."""
        return [patch for i in on for patch in patches[i]]

    def merged(self, layer: Any, on: On, kept: Kept | None, alone: bool, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the patches, rounded as ComfyUI rounds a LoRA that it merges into this storage.

        `weight` may be the resident tensor, so it is copied. Where nothing else changes the weight, the stored one is taken:
        `weight` was rounded to the type of the computation already.
        """
        stored, name = getattr(layer, self.kind), (on, self.key, weight.dtype)
        resident = alone and stored.device == weight.device
        if resident and kept is not None and name in kept.values:
            return kept.values[name]
        value = self._merged(layer, on, stored if resident else weight)
        value = host.plain(value, weight.dtype)
        if resident and kept is not None:
            kept.keep(name, value)
        return value

    def _merged(self, layer: Any, on: On, source: torch.Tensor) -> torch.Tensor:
        value = source.to(host.lora_dtype(source.device), copy=True)
        convert = getattr(layer, f"convert_{self.kind}", None)
        if convert is not None:
            value = convert(value, inplace=True)
        shape = value.shape
        value = comfy.lora.calculate_weight(self.of(self.on(source.device), on), value, self.key)
        if value.shape != shape:
            raise ValueError(f"the LoRA changes the shape of {self.key}, which cannot be switched: load another LoRA")
        return host.rounded(layer, self.kind, value, host.string_to_seed(self.key))

    def on(self, device: torch.device) -> list[list[tuple[Any, ...]]]:
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


def gated(model: Any, adapters: Sequence[Patches]) -> tuple[Any, Gate]:
    """A clone of `model` and the gate of the adapters over it. The same patches over the same model share a gate."""
    made_of = tuple((i, key, *map(_name, listed)) for i, found in enumerate(adapters) for key, listed in found.items())
    gate = _gates.get((model.patches_uuid, made_of))
    if gate is None:  # which holds the patches, so that no others take their ids
        gate = _gates[model.patches_uuid, made_of] = Gate(model, adapters)
    made = model.clone()
    for key in gate.weights:
        made.add_weight_wrapper(key, Attached(gate, key))
    made.patches_uuid = gate.uuid
    return made, gate


def _name(patch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells a patch from others while it lives: strength, adapter, strength of the weight itself, offset, function."""
    strength, adapter, strength_model, offset, function = (*patch, None, None)[:5]
    return strength, id(adapter), strength_model, offset, id(function)


def without_gate(model: Any) -> Any:
    """A clone of a MODEL without the gate that was put over it."""
    bare = model.clone()
    for key, functions in list(bare.weight_wrapper_patches.items()):
        others = [f for f in functions if not isinstance(f, Attached)]
        bare.weight_wrapper_patches.pop(key)
        if others:
            bare.weight_wrapper_patches[key] = others
    return bare


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


def _decide_how(model: Any, weights: dict[str, GatedWeight]) -> None:
    """Find by trial how each kind of layer takes patches while it samples, or refuse."""
    tried: dict[tuple[Any, ...], bool | None] = {}
    for key, weight in weights.items():
        layer = comfy.utils.get_attr(model.model, weight.path)
        if not hasattr(layer, f"{weight.kind}_function"):
            raise ValueError(f"the LoRA changes {key}, which ComfyUI cannot change while it samples: merge it into a second checkpoint")
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
