"""How two models share weights: one set of them and gated patches, where both are clones of one model; else two sets, both resident."""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_sampling
import comfy.patcher_extension
import comfy.weight_adapter
import torch

from . import host
from .gate import Patches
from .same import difference

_Found = dict[str, list[tuple[Any, ...]]]


def split(base: Any, tuned: Any, strength: float = 1.0, *, may_be_equal: bool = False) -> tuple[Any, Patches, Patches]:
    """A clone of `base` with the patches that both models have, and those that base and tuned have over it.

    Both are clones of one model. strength: of the tuned model's own patches. ValueError where they are equal, if they must not be.
    """
    patches = [{key: patch for key, patch in m.object_patches.items() if key != "model_sampling"} for m in (base, tuned)]
    if difference(*patches) is not None or not _same_sampling(base, tuned):
        raise ValueError("base and tuned model have different model patches (sampling settings, say): patch first, then load the LoRA")
    early: _Found = {}
    late: _Found = {}
    both: _Found = {}
    for key in dict.fromkeys([*base.patches, *tuned.patches]):
        ours, theirs = base.patches.get(key, []), tuned.patches.get(key, [])
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if _differ(a, b)), min(len(ours), len(theirs)))
        for found, listed in ((both, ours[:same]), (early, ours[same:]), (late, theirs[same:])):
            if listed:
                found[key] = list(listed)
    if strength != 1.0 and any(patch[2] != 1.0 for listed in late.values() for patch in listed):
        raise ValueError(
            f"strength {strength:g}: the tuned model is a merge of models, not a LoRA; only 1 is possible, merge at another ratio"
        )
    late = {key: [(patch[0] * strength, *patch[1:]) for patch in listed] for key, listed in late.items()}
    if not may_be_equal:
        require_effect(early, late)
    shared = base.clone()
    if early:
        shared.patches = both
        # ComfyUI loads anew what has another uuid: the same two models give the same one
        shared.patches_uuid = uuid.uuid5(base.patches_uuid, str(tuned.patches_uuid))
    return shared, early, late


def _same_sampling(base: Any, tuned: Any) -> bool:
    """Whether both read a noise level alike. Flow models may space their levels by different shifts: the network is given σ itself."""
    ours, theirs = (m.get_model_object("model_sampling") for m in (base, tuned))
    if difference(ours, theirs) is None:
        return True
    sigma = torch.tensor([0.25, 0.5])
    flow = all(isinstance(sampling, comfy.model_sampling.CONST) for sampling in (ours, theirs))
    return flow and bool(torch.equal(ours.timestep(sigma), theirs.timestep(sigma)))


def require_effect(*adapters: Patches) -> None:
    """Refuse patches of which none changes anything."""
    if any(_changes(patch) for patches in adapters for listed in patches.values() for patch in listed):
        return
    if any(adapters):
        raise ValueError(
            "the tuned model's LoRA changes nothing: its weights or its strength are zero; load another, or raise the strength"
        )
    raise ValueError("the tuned model equals the base: load the reward LoRA on it")


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
