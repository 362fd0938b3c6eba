"""ComfyUI's models made fit for autograd: whole on their device, out of dynamic VRAM, with kernels that have a gradient."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .schedule import KEY

_FUSED = "rms_rope_split_half"


@contextmanager
def outside_inference() -> Generator[None]:
    """Inside, tensors are ordinary ones, which autograd can save. ComfyUI moves models as elsewhere, in inference mode.

    On a GPU a parameter that was made in inference mode and is moved outside of it has no version counter from then on: no layer takes
    it, neither here nor in a stock sampler later. Making room moves models that have nothing to do with ours, too.
    """
    management, load = comfy.model_management, comfy.model_management.load_models_gpu

    @functools.wraps(load)
    def in_inference_mode(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return load(*args, **kwargs)

    management.load_models_gpu = in_inference_mode
    try:
        with torch.inference_mode(False):
            yield
    finally:
        management.load_models_gpu = load


def bring_whole(patchers: Sequence[Any]) -> None:
    """Let ComfyUI bring networks to their device, making room as for any model. Ours cannot stream: --novram would leave them behind."""
    comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)
    for patcher in patchers:
        if any(p.device.type != patcher.load_device.type for p in patcher.model.parameters()):
            patcher.model.to(patcher.load_device)
            patcher.model.model_loaded_weight_memory = patcher.model_size()  # ComfyUI frees as much when it unloads it


def refuse_switch(model: Any) -> None:
    """Refuse the MODEL of a switch: training evaluates no wrappers, so it would train the base alone."""
    if model.get_wrappers(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY):
        raise ValueError("model comes from a Base→Tuned Switch or a LoRA in a range: connect the model that goes into it")


def resident(patcher: Any) -> Any:
    """The patcher; of one in dynamic VRAM, whose layers share buffers that autograd would save, a copy with weights of its own."""
    if not getattr(patcher, "is_dynamic", bool)():
        return patcher
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as problem:  # the copy is loaded anew, which only ComfyUI's own loaders can
        raise ValueError(
            f"this {type(patcher.model).__name__} cannot leave dynamic VRAM, as training needs: load it with a loader of ComfyUI's own, "
            "or start ComfyUI with --disable-dynamic-vram"
        ) from problem


def resident_vae(vae: Any) -> Any:
    """The same of a VAE, its weights in the type that it computes in: out of dynamic VRAM, nothing casts them from that of their file."""
    before = getattr(vae, "patcher", None)
    patcher = resident(before)
    if patcher is before:
        return vae
    patcher.model.to(vae.vae_dtype)
    copied = copy.copy(vae)
    copied.patcher, copied.first_stage_model = patcher, patcher.model
    return copied


def require_whole(*patchers: Any) -> None:
    """Refuse models that are only partly on their device where ComfyUI casts the other layers into one buffer after another."""
    if not hasattr(comfy.model_management, "get_cast_buffer"):
        return
    for patcher in patchers:
        if any(p.device.type != patcher.load_device.type for p in patcher.model.parameters()):
            raise ValueError(
                f"{type(patcher.model).__name__} is not whole on {patcher.load_device}, as training needs: start ComfyUI without --novram"
            )


@contextmanager
def differentiable_kernels() -> Generator[None]:
    """Inside, ComfyUI evaluates models with kernels that have a gradient; afterwards its flag is as before."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):  # before 0.13 there are no others
        yield
        return
    kernels = getattr(sys.modules.get("comfy.quant_ops"), "ck", None)
    fused = getattr(kernels, _FUSED, None)  # Cosmos Predict2 and Anima call it in training, too, and it has no gradient
    before, management.in_training = management.in_training, True
    if fused is not None:
        setattr(kernels, _FUSED, normed_and_rotated)
    try:
        yield
    finally:
        management.in_training = before
        if fused is not None:
            setattr(kernels, _FUSED, fused)


def normed_and_rotated(
    q: Tensor, k: Tensor, freqs_cis: Tensor, q_scale: Tensor, k_scale: Tensor | None = None, epsilon: float = 1e-6, rot_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """comfy_kitchen's rms_rope_split_half with a gradient: RMS norm over the last dimension, then a rotation of its halves.

    q and k are (…,width). freqs_cis (…,n,2,2) are rotation matrices of the pairs (i, i+n), with n half of the width or of `rot_dim`.
    """

    def one(x: Tensor, scale: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], scale, epsilon)
        width = rot_dim or x.shape[-1]
        pairs = x[..., :width].unflatten(-1, (2, -1)).mT.to(freqs_cis.dtype)
        rotated = (freqs_cis * pairs.unsqueeze(-2)).sum(-1).mT.flatten(-2).type_as(x)
        return torch.cat([rotated, x[..., width:]], -1)

    return one(q, q_scale), one(k, q_scale if k_scale is None else k_scale)


def make_trainable_through(module: nn.Module) -> None:
    """Replace inference tensors, which autograd refuses, by equal ordinary ones; no gradient to the weights themselves."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and (parameter.is_inference() or parameter.requires_grad):
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


def ordinary(value: Any) -> Any:
    """A copy, made outside inference mode, of a tensor or of those in a list; anything else as it is."""
    if isinstance(value, list):
        return [ordinary(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value
