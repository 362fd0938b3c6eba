"""One door to the symbols of ComfyUI that are private or differ between its versions: found by feature, tested once at import."""

from __future__ import annotations

import copy
import functools
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.utils
import comfyui_version
import folder_paths
import torch

TESTED = ("0.3.48", "0.3.64", "0.16.0", "0.33.0")

# What nodes do and, for each, what it takes of ComfyUI that is private or may change: module:name, and parameters given by name
_NEEDED = {
    "switch models": (
        "comfy.lora:calculate_weight",
        "comfy.float:stochastic_rounding",
        "comfy.utils:get_attr",
        "comfy.weight_adapter:LoRAAdapter",
        "comfy.weight_adapter:WeightAdapterBase",
        "comfy.model_management:cast_to_device",
        "comfy.model_base:BaseModel._apply_model",
        "comfy.model_sampling:CONST",
        "comfy.patcher_extension:WrappersMP.APPLY_MODEL",
        "comfy.patcher_extension:WrappersMP.OUTER_SAMPLE",
        "comfy.model_base:BaseModel.memory_required",
        "comfy.model_management:get_free_memory",
        "comfy.model_management:minimum_inference_memory",
        "comfy.model_patcher:ModelPatcher.add_weight_wrapper",
        "comfy.model_patcher:ModelPatcher.add_wrapper_with_key",
        "comfy.model_patcher:ModelPatcher.get_wrappers",
        "comfy.model_patcher:ModelPatcher.remove_wrappers_with_key",
        "comfy.model_patcher:ModelPatcher.remove_attachments",
        "comfy.model_patcher:ModelPatcher.set_additional_models",
        "comfy.model_patcher:ModelPatcher.get_attachment",
    ),
    "sample": (
        "comfy.samplers:sampling_function model_options seed",
        "comfy.samplers:calc_cond_batch",
        "comfy.samplers:cfg_function model_options cond uncond",
        "comfy.samplers:CFGGuider.inner_set_conds",
        "comfy.samplers:CFGGuider.sample denoise_mask callback disable_pbar seed",
        "comfy.samplers:KSampler",
        "comfy.samplers:Sampler.max_denoise",
        "comfy.samplers:sampler_object",
        "comfy.sample:fix_empty_latent_channels",
        "comfy.sample:prepare_noise",
        "latent_preview:prepare_callback",
    ),
    "search by reward": (
        "comfy.samplers:KSAMPLER",
        "comfy.samplers:KSamplerX0Inpaint",
        "comfy.model_base:BaseModel.process_latent_out",
        "comfy.model_base:BaseModel.memory_required",
        "comfy.model_management:load_models_gpu memory_required",
    ),
    "guide by density": (
        "comfy.patcher_extension:WrappersMP.PREDICT_NOISE",
        "comfy.model_patcher:ModelPatcher.add_wrapper_with_key",
        "comfy.model_sampling:CONST",
        "comfy.model_sampling:EPS",
    ),
    "load LoRAs": (
        "comfy.lora:model_lora_keys_unet",
        "comfy.lora:load_lora log_missing",
        "comfy.lora_convert:convert_lora",
        "comfy.model_patcher:ModelPatcher.set_attachments",
    ),
    "score images": (
        "comfy.model_management:load_models_gpu force_full_load",
        "comfy.model_management:unet_offload_device",
        "comfy.model_management:throw_exception_if_processing_interrupted",
        "folder_paths:folder_names_and_paths",
    ),
    "train": (
        "comfy.samplers:encode_model_conds",
        "comfy.samplers:calculate_sigmas",
        "comfy.sampler_helpers:convert_cond",
        "comfy.conds:CONDRegular.process_cond batch_size device area",
        "comfy.ldm.modules.attention:attention_pytorch",
        "comfy.model_base:BaseModel.extra_conds",
        "comfy.model_base:BaseModel.memory_required",
        "comfy.model_management:load_models_gpu memory_required force_full_load",
        "comfy.model_management:processing_interrupted",
        "comfy.model_sampling:CONST",
        "comfy.sd:load_lora_for_models",
        "comfy.utils:unet_to_diffusers",
        "comfy.utils:ProgressBar",
    ),
    "build the demo model": (
        "comfy.utils:unet_to_diffusers",
        "comfy.diffusers_convert:convert_vae_state_dict",
        "comfy.supported_models:SD15",
        "comfy.sd1_clip:SDClipModel",
        "comfy.sd1_clip:SDTokenizer",
        "comfy.sd:CLIP model_options",
        "comfy.sd:VAE sd config dtype",
    ),
}
_AROUND = (
    *("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function"),
    "model_function_wrapper",
)
_OF_A_MODEL = ("patches", "object_patches", "patches_uuid", "backup", "model_options")

string_to_seed = getattr(comfy.utils, "string_to_seed", None) or getattr(comfy.model_patcher, "string_to_seed", None)
_Quantized = getattr(comfy.ops, "QuantizedTensor", ())  # scaled fp8, int8, nvfp4; not in old versions


def lora_dtype(device: torch.device) -> torch.dtype:
    """The type in which ComfyUI adds a LoRA to a weight on this device."""
    find = getattr(comfy.model_management, "lora_compute_dtype", None)
    return find(device) if find else torch.float32


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An ordinary tensor of that type, from one in any of ComfyUI's storages."""
    tensor = tensor.to(dtype)
    return tensor.dequantize() if isinstance(tensor, _Quantized) else tensor


def rounded(layer: Any, kind: str, value: torch.Tensor, seed: int) -> torch.Tensor:
    """A new weight or bias of a layer as ComfyUI stores it there when it merges a LoRA; the layer keeps its own."""
    if not hasattr(layer, f"set_{kind}"):
        return comfy.float.stochastic_rounding(value, getattr(layer, kind).dtype, seed=seed)
    if _returns_weights(type(layer), kind):
        return getattr(layer, f"set_{kind}")(value, inplace_update=False, seed=seed, return_weight=True)
    copied = copy.copy(layer)  # scaled fp8 up to 0.3.64 can store it only
    copied._parameters = dict(layer._parameters)
    getattr(copied, f"set_{kind}")(value, inplace_update=False, seed=seed)
    return getattr(copied, kind)


@functools.lru_cache(maxsize=64)
def _returns_weights(layer: type[Any], kind: str) -> bool:
    return "return_weight" in inspect.signature(getattr(layer, f"set_{kind}")).parameters


def latent_for(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of LATENT as the stock sampler starts from them: an empty one takes the model's channels and scale."""
    fix, names = comfy.sample.fix_empty_latent_channels, ("downscale_ratio_spacial", "downscale_ratio_temporal")
    known = inspect.signature(fix).parameters
    return fix(model, latent["samples"], **{name: latent.get(name) for name in names if name in known})


def finished(latent: dict[str, Any], samples: torch.Tensor) -> dict[str, Any]:
    """LATENT as the stock sampler hands it on."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: samples.dtype)()
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio_")}
    return {**kept, "samples": samples.to(device=comfy.model_management.intermediate_device(), dtype=dtype)}


def patches_around(model: Any) -> list[str]:
    """What of a MODEL acts around its network while a guider samples, by the names that ComfyUI has for it."""
    options = [key for key, value in model.model_options.items() if key in _AROUND and value]
    return options + [kind for kind, by_key in getattr(model, "wrappers", {}).items() if any(by_key.values())]


def register_folder(name: str, *extensions: str) -> None:
    """The folder `name` below models, beside those that extra_model_paths.yaml or another pack registered under that name.

    Their extensions stay; none at all means any.
    """
    paths, known = folder_paths.folder_names_and_paths.get(name, ([], set(extensions)))
    ours = str(Path(folder_paths.models_dir) / name)
    merged = {*known, *extensions} if known else set()
    folder_paths.folder_names_and_paths[name] = ([*paths, *([] if ours in paths else [ours])], merged)


class _Reached(BaseException):
    """Ends a trial forward pass; no `except Exception` of a layer may swallow it."""


class _Mine:
    """An entry of a tensor's own list of patches that ends the trial when it is read."""

    def __iter__(self) -> Any:
        raise _Reached


def calls_weight_functions(module: Any, kind: str) -> bool:
    """Whether a forward pass of the module changes its `kind` (weight or bias) by the functions that it lists.

    Tried on a shallow copy, whose forward pass ends at the first call: having the list does not mean that it is heeded.
    """

    def stop(_: torch.Tensor) -> torch.Tensor:
        raise _Reached

    trial = copy.copy(module)
    trial.__dict__.pop("_v", None)  # streamed weights read no functions on a CPU
    if not hasattr(trial, f"{kind}_function"):
        return False
    setattr(trial, f"{kind}_function", [stop])
    return _is_reached(trial, getattr(module, kind))


def reads_own_patches(module: Any, kind: str) -> bool:
    """Whether the stored tensor carries patches that are added whenever it is decoded, as in GGUF models.

    Not where it is of a floating type: decoding may be the tensor itself, and patches are added in place.
    """
    stored = getattr(module, kind)
    if not isinstance(getattr(stored, "patches", None), list) or stored.dtype.is_floating_point:
        return False
    before, stored.patches = stored.patches, [_Mine()]
    try:
        return _is_reached(copy.copy(module), stored)
    finally:
        stored.patches = before


def _is_reached(trial: Any, stored: torch.Tensor) -> bool:
    if hasattr(trial, "num_embeddings"):
        x = torch.zeros(1, 1, dtype=torch.long, device=stored.device)
    else:
        size = (1, 1, getattr(trial, "in_features", None) or (*getattr(trial, "normalized_shape", ()), 1)[0])
        size = (1, trial.num_channels, 4) if hasattr(trial, "num_channels") else size
        size = (1, trial.in_channels, *(4 for _ in trial.kernel_size)) if hasattr(trial, "kernel_size") else size
        x = torch.zeros(size, device=stored.device)
    try:
        type(trial).forward(trial, x)
    except _Reached:
        return True
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception:
        return False
    return False


def problem(feature: str) -> str | None:
    """Why the pack cannot do this on this ComfyUI, in one sentence; None if it can. Features are those that `_NEEDED` lists."""
    missing = [lacking for entry in _NEEDED[feature] if (lacking := _lacking(entry))]
    if feature == "switch models" and not missing:
        missing = _other_weight_patches()
    if not missing:
        return None
    return f"ImageReFL cannot {feature} on ComfyUI {comfyui_version.__version__}, which lacks {', '.join(missing)}: update ImageReFL"


def _lacking(entry: str) -> str | None:
    """What of an entry of `_NEEDED` is not there."""
    name, *parameters = entry.split()
    shown = name.replace(":", ".")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return shown
    if not parameters:
        return None
    known = inspect.signature(found).parameters
    if any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in known.values()):
        return None
    return next((f"{parameter} of {shown}" for parameter in parameters if parameter not in known), None)


def _other_weight_patches() -> list[str]:
    """What is not as the switch needs it, found by a trial on one layer."""
    if string_to_seed is None:
        return ["comfy.utils.string_to_seed"]
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Module(), torch.device("cpu"), torch.device("cpu"))
    lacking = [f"ModelPatcher.{name}" for name in _OF_A_MODEL if not hasattr(patcher, name)]
    try:
        layer = comfy.ops.manual_cast.Linear(2, 1, bias=False, device="cpu", dtype=torch.float32)
        layer.weight = torch.nn.Parameter(torch.zeros(1, 2), requires_grad=False)
        one = comfy.lora.calculate_weight([(1.0, ("diff", (torch.ones(1, 2),)), 1.0, None, None)], torch.zeros(1, 2), "weight")
        rounded = comfy.float.stochastic_rounding(one, torch.float8_e4m3fn, seed=string_to_seed("weight"))
        if not calls_weight_functions(layer, "weight") or float(plain(rounded, torch.float32).sum()) != 2.0:
            lacking.append("weight functions as they were")
    except Exception as error:
        lacking.append(f"weight patches as they were ({type(error).__name__}: {error})")
    return lacking


def is_newer_than_tested() -> bool:
    """Whether no tested version is as new as this ComfyUI."""
    return _numbers(comfyui_version.__version__) > _numbers(TESTED[-1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


PROBLEM = problem("switch models")
