"""One door to the symbols of ComfyUI that are private or differ between its versions: found by feature, tested once at import."""

from __future__ import annotations

import copy
import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
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
from comfy.cli_args import args

from ..trainer.runtime.device import set_cudnn_attention
from .needs import NEEDED

TESTED = ("0.3.48", "0.3.64", "0.16.0", "0.33.0")

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


@contextmanager
def attention_with_gradient() -> Generator[None]:
    """Inside, attention is not cuDNN's, which ComfyUI prefers on CUDA: see `set_cudnn_attention`."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])  # there with CUDA alone
    before, allowed = list(order), set_cudnn_attention(False)
    order[:] = [backend for backend in order if backend.name != "CUDNN_ATTENTION"]
    try:
        yield
    finally:
        order[:] = before
        set_cudnn_attention(allowed)


def register_folder(name: str, *extensions: str) -> None:
    """The folder `name` below models, beside those that extra_model_paths.yaml or another pack registered under that name.

    Their extensions stay; none at all means any.
    """
    paths, known = folder_paths.folder_names_and_paths.get(name, ([], set(extensions)))
    ours = str(Path(folder_paths.models_dir) / name)
    merged = {*known, *extensions} if known else set()
    folder_paths.folder_names_and_paths[name] = ([*paths, *([] if ours in paths else [ours])], merged)


def server() -> Any:
    """The running PromptServer; None where a script calls the nodes."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def user_of(request: Any) -> str:
    """The user that a request names in its header `comfy-user`, or `default` without --multi-user; KeyError for an unknown one."""
    return server().user_manager.get_request_user_id(request)


def has_users() -> bool:
    """Whether ComfyUI was started with --multi-user."""
    return bool(args.multi_user)


def user_folder(user: str) -> Path:
    """A user's folder, which the browser's settings lie in; KeyError for names that ComfyUI keeps from its routes."""
    find = getattr(folder_paths, "get_public_user_directory", None)
    root = Path(folder_paths.get_user_directory()).absolute()
    folder = Path(find(user) or "") if find else root / user
    if folder.absolute().parent != root:
        raise KeyError(f"Unknown user: {user}")
    return folder.absolute()


def client() -> str | None:
    """The id of the browser tab that queued what runs now; None for a script."""
    return getattr(server(), "client_id", None)


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
    """Why the pack cannot do this on this ComfyUI, in one sentence; None if it can. Features are those that `NEEDED` lists."""
    missing = [lacking for entry in NEEDED[feature] if (lacking := _lacking(entry))]
    if feature == "switch models" and not missing:
        missing = _other_weight_patches()
    if not missing:
        return None
    return f"ImageReFL cannot {feature} on ComfyUI {comfyui_version.__version__}, which lacks {', '.join(missing)}: update ImageReFL"


def _lacking(entry: str) -> str | None:
    """What of an entry of `NEEDED` is not there."""
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
