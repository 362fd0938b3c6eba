"""Run inside a ComfyUI: the gate on every storage of weights, against the same LoRA merged by ComfyUI.

Usage: storages.py COMFYUI PACK [COMFYUI-GGUF]. Prints one JSON line. No model is loaded: four layers stand for one.
"""

import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.lora
import comfy.ops
import torch
from layers import (
    BASE,
    CPU,
    Dynamic,
    Ignoring,
    OwnPatches,
    Resident,
    TUNED,
    X,
    cast,
    digest,
    distance,
    gated,
    host,
    listing,
    lora,
    network,
    patcher,
    quantized,
)
from torch import nn

LAYERS = ("first", "norm", "conv", "last")


def try_storage(make, dtype=torch.float32, size=0.05, memory=0, kind=None, merging=None, patches=None, layers=LAYERS):
    """The gate off against the base and on against ComfyUI's merged LoRA, as outputs and as the weights of every layer."""
    x, patches = X.to(dtype), patches or lora(size)
    merged = patcher(make(), merging)
    merged.add_patches(patches, 1.0)
    merged.patch_model(CPU)
    model = make()
    base = patcher(model, kind or merging)
    base.patch_model(CPU, lowvram_model_memory=memory)
    plain, before = model.diffusion_model(x), digest(model)
    tuned = base.clone()
    tuned.add_patches(patches, 1.0)
    switch, gate = gated(base, tuned)
    base.unpatch_model(CPU)
    switch.patch_model(CPU, lowvram_model_memory=memory)
    out = {}
    with gate.applied(model, BASE):
        out["off"] = distance(model.diffusion_model(x), plain)
    for _ in range(3):
        with gate.applied(model, TUNED):
            y = model.diffusion_model(x)
    out["on"] = distance(y, merged.model.diffusion_model(x))
    out["effect"] = distance(y, plain)
    worst = 0.0
    for name in layers:
        expected = cast(getattr(merged.model.diffusion_model, name), x)
        with gate.applied(model, TUNED):
            worst = max(worst, *map(distance, cast(getattr(model.diffusion_model, name), x), expected))
    out["weights"] = worst
    out["base kept"] = digest(model) == before
    with gate.applied(model, BASE):
        out["base kept"] = out["base kept"] and torch.equal(model.diffusion_model(x), plain)
    return out, (model, gate, merged)


results = {"storage": {}, "problem": host.PROBLEM}
fp32, bf16, fp16, fp8, fp8_wide = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2


def storage(name, *args, **kwargs):
    results["storage"][name], rest = try_storage(*args, **kwargs)
    return rest


with torch.inference_mode():
    for name, dtype in (("float32", fp32), ("float16", fp16), ("bfloat16", bf16)):
        storage(name, partial(network, dtype=dtype))
        storage(f"{name} in part", partial(network, dtype=dtype), memory=1)
    storage("float32, computed in bfloat16", partial(network, dtype=fp32), bf16)
    storage("float16, computed in bfloat16", partial(network, dtype=fp16), bf16)
    for name, dtype in (("fp8 e4m3", fp8), ("fp8 e5m2", fp8_wide)):
        storage(name, partial(network, dtype=dtype))
        storage(f"{name}, computed in bfloat16", partial(network, dtype=dtype), bf16)

    # fast matmul of fp8: the function is handed fp8 and must give fp8; how much of a small LoRA is left, as a share of it
    results["fp8 fast"], key = {}, "diffusion_model.first.weight"
    for size in (0.003, 0.01, 0.03, 0.1):
        _, (model, gate, merged) = try_storage(partial(network, dtype=fp8), size=size)
        layers = [m.diffusion_model.first for m in (model, merged.model)]
        fast = {"dtype": fp8, "bias_dtype": fp32}
        with gate.applied(model, TUNED):
            weight, _ = cast(layers[0], X, **fast)
        stock, _ = cast(layers[1], X, **fast)
        stored = model.diffusion_model.first.weight.float()
        wanted = comfy.lora.calculate_weight([(1.0, lora(size)[key], 1.0, None, None)], stored.clone(), key) - stored
        kept = float(((weight - stored) * wanted).sum() / wanted.square().sum())
        results["fp8 fast"][str(size)] = {"against stock": distance(weight, stock), "share": kept}

    if hasattr(comfy.ops, "scaled_fp8_ops"):
        ops = comfy.ops.scaled_fp8_ops(override_dtype=fp8)

        def scaled(layer, weight):
            layer.scale_weight = nn.Parameter(weight.abs().max() / 400, requires_grad=False)
            return (weight / layer.scale_weight).to(fp8)

        for name, dtype in (("fp8 scaled", fp32), ("fp8 scaled, computed in bfloat16", bf16)):
            storage(name, partial(network, ops, dtype, store=scaled), dtype)
    if hasattr(comfy.ops, "mixed_precision_ops"):
        formats = {"fp8 scaled": "float8_e4m3fn", "int8": "int8_tensorwise", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}
        for dtype, suffix in ((fp32, ""), (bf16, ", computed in bfloat16")):
            ops = comfy.ops.mixed_precision_ops({}, dtype, disabled=set(comfy.ops.QUANT_ALGOS))
            for name, format_ in formats.items():
                if format_ in comfy.ops.QUANT_ALGOS:
                    storage(name + suffix, partial(network, ops, dtype, store=partial(quantized, format_, dtype)), dtype)

    storage("the resident tensor", lambda: network(linear=Resident))
    storage("no wrappers on small layers", network, kind=Dynamic)

    # GGUF-like layers
    weights_only = {key: patch for key, patch in lora(0.05).items() if key.endswith(("first.weight", "last.weight"))}
    model = network(linear=OwnPatches, store=listing)
    merged = network(linear=OwnPatches, store=listing)
    base = patcher(model)
    tuned = base.clone()
    tuned.add_patches(weights_only)
    for name in ("first", "last"):
        key = f"diffusion_model.{name}.weight"
        getattr(merged.diffusion_model, name).weight.patches = [(tuned.patches[key], key)]
    plain, before = model.diffusion_model(X), digest(model)
    switch, gate = gated(base, tuned)
    switch.patch_model(CPU)
    with gate.applied(model, TUNED):
        on = model.diffusion_model(X)
    with gate.applied(model, BASE):
        off = model.diffusion_model(X)
    results["own patches"] = {
        "on": distance(on, merged.diffusion_model(X)), "off": distance(off, plain), "effect": distance(on, plain),
        "base kept": digest(model) == before and model.diffusion_model.first.weight.patches == [],
    }  # fmt: skip
    base = patcher(network(linear=Ignoring))
    tuned = base.clone()
    tuned.add_patches(weights_only)
    results["ignoring"] = embedded.refused(lambda: gated(base, tuned))

    if embedded.arguments:
        sys.modules.setdefault("nodes", types.ModuleType("nodes"))  # ComfyUI's own, which their loader reads when it is used
        spec = importlib.util.spec_from_file_location("gguf_pack", Path(embedded.arguments[0]) / "__init__.py")
        spec.submodule_search_locations = [embedded.arguments[0]]
        sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
        loader, layers = (importlib.import_module(f"gguf_pack.{name}") for name in ("nodes", "ops"))
        gguf = sys.modules["gguf"]

        def q8(_layer, weight):
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
            return nn.Parameter(layers.GGMLTensor(packed, tensor_type=kind, tensor_shape=weight.shape), requires_grad=False)

        matrices = {key: patch for key, patch in lora(0.05).items() if key.endswith(".weight")}
        for dtype in (fp32, bf16):
            make, name = partial(network, layers.GGMLOps, store=q8), f"GGUF Q8_0, computed in {str(dtype)[6:]}"
            storage(name, make, dtype, merging=loader.GGUFModelPatcher, patches=matrices, layers=("norm", "conv"))

    # an exception inside leaves nothing behind; neither does a clone of the model on another GPU share the gate
    model = network()
    base = patcher(model)
    tuned = base.clone()
    tuned.add_patches(lora(0.05))
    _, gate = gated(base, tuned)
    plain, other = model.diffusion_model(X), network()
    try:
        with gate.applied(model, TUNED):
            results["another clone while on"] = distance(other.diffusion_model(X), plain)
            raise KeyError
    except KeyError:
        results["after an exception"] = distance(model.diffusion_model(X), plain)


print(json.dumps(results))
