"""Quantised frozen weights: linear layers in int8 or fp8 (torchao) or nf4 (bitsandbytes), by diffusers' and transformers' configurations.

int8 and fp8 have one scale per output (weight only, the product is in the activations' precision); nf4 is QLoRA's with double
quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3). Adapters and all other weights keep their precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .speed import cast as cast_weights

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
_NF4_BLOCK, _NESTED_BLOCK = 64, 256  # weights per absmax, and absmaxes per scale of their own


@dataclass(frozen=True)
class Quantisation:
    """The formats of a model's linear layers, of its denoiser and of its text encoders; "" is none."""

    denoiser: str = ""
    text_encoders: str = ""

    def check(self, device: torch.device) -> None:
        """ValueError with the remedy for a format that is unknown, or whose library or device is not there."""
        for key, kind in (("quantisation", self.denoiser), ("text_encoder_quantisation", self.text_encoders)):
            if kind and kind not in LIBRARIES:
                raise ValueError(f"{key} = {kind!r}: use one of {', '.join(LIBRARIES)}")
            if not kind or device.type == "meta":
                continue
            if find_spec(LIBRARIES[kind]) is None:
                raise ValueError(f"{key} = {kind} needs {LIBRARIES[kind]}, which is not installed: pip install {LIBRARIES[kind]}")
            if kind == "nf4" and device.type == "cpu":
                raise ValueError(f"{key} = nf4 needs a GPU: on a CPU use int8 or fp8")

    def kind(self, component: str) -> str:
        """The format of a component by its name in the pipeline."""
        if component in ("unet", "transformer"):
            return self.denoiser
        return self.text_encoders if component.startswith("text_encoder") else ""

    def arguments(self, index: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a pipeline's loader; index: its `model_index.json`."""
        parts: dict[str, Any] = json.loads(index.read_text("utf-8"))
        kinds = {name: kind for name, value in parts.items() if isinstance(value, list) and value[0] and (kind := self.kind(name))}
        configs = {name: _config(parts[name][0], kind, dtype) for name, kind in kinds.items() if isinstance(parts[name][0], str)}
        if not configs:
            return {}
        import diffusers

        if not hasattr(diffusers, "PipelineQuantizationConfig"):
            raise ValueError(f"diffusers {diffusers.__version__} quantises no pipelines: pip install --upgrade diffusers")
        return {"quantization_config": cast(Any, diffusers).PipelineQuantizationConfig(quant_mapping=configs)}


NONE = Quantisation()


def _config(library: str, kind: str, dtype: torch.dtype) -> Any:
    """A component's configuration, of the class that diffusers or transformers takes."""
    classes = import_module(library)
    if kind == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        return classes.BitsAndBytesConfig(load_in_4bit=True, **options)
    return classes.TorchAoConfig(_torchao(kind))


def _torchao(kind: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    config: Any = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    return config(set_inductor_config=False)  # which would switch TF32 on


def quantise(module: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Quantise a loaded module in place, the layers and the numbers that its library would while it loads them."""
    cast_weights(module, dtype, _kept(module))
    for parent, name, layer in list(_layers(module, kind)):
        if kind != "nf4":
            from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

            quantize_(layer, _torchao(kind))
            continue
        from bitsandbytes import nn as bnb  # pyright: ignore[reportMissingImports]

        made: Any = bnb.Linear4bit(layer.in_features, layer.out_features, False, dtype, quant_type="nf4", device="meta")
        made.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = layer.bias
        setattr(parent, name, made.to(layer.weight.device))  # which quantises


def _layers(module: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers that are quantised: parent, name there, layer. diffusers and bitsandbytes leave what is to stay in float32."""
    kept = _kept(module, always=kind == "nf4")
    output = getattr(module, "get_output_embeddings", lambda: None)()  # of transformers' models, which leave it as it is
    for path, parent in module.named_modules():
        for name, layer in parent.named_children():
            whole = f"{path}.{name}.".lstrip(".")
            if type(layer) is nn.Linear and layer is not output and not any(f"{part}." in whole for part in kept):
                yield parent, name, layer


def _kept(module: nn.Module, always: bool = False) -> Collection[str]:
    """Names of submodules that stay in float32; those of transformers' models only stay unquantised."""
    return getattr(module, "_keep_in_fp32_modules", None) or () if always or type(module).__module__.startswith("diffusers") else ()


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer with quantised weights."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None  # pyright: ignore[reportPrivateUsage]
    return weight is not None and (not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter))


def has_quantised(network: nn.Module) -> bool:
    """Whether some of a network's layers are quantised."""
    return any(map(is_quantised, network.modules()))


def original_shape(weight: Tensor) -> tuple[int, ...]:
    """A weight's shape before it was quantised."""
    return tuple(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))


def dequantised(weight: Tensor) -> Tensor:
    """The numbers that a quantised weight stands for."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, state)


def scales(weight: Tensor) -> list[Tensor]:
    """What a quantised weight is multiplied by: not finite where the original weight was not."""
    state = getattr(weight, "quant_state", None)
    if state is not None:  # bitsandbytes
        return [state.absmax if state.state2 is None else state.state2.absmax]
    return [scale for scale in [getattr(weight, "scale", None)] if scale is not None]


# -- on the meta device ------------------------------------------------------------------------------------------------


class MetaLinear(nn.Linear):
    """A quantised layer on the meta device: its bytes, and in a forward and backward pass the same copies as its library makes."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.kind, self.compute_dtype, self.bias = kind, layer.weight.dtype, layer.bias
        shape, number = layer.weight.shape, layer.weight.numel()
        sizes = {"scale": ((shape[0], 1), torch.float32), "zero_point": ((shape[0], 1), torch.int8)}
        if kind == "nf4":
            shape, blocks = (math.ceil(number / 2), 1), math.ceil(number / _NF4_BLOCK)
            sizes = {"absmax": ((blocks,), torch.uint8), "nested": ((math.ceil(blocks / _NESTED_BLOCK),), torch.float32)}
            sizes |= {"code": ((16,), torch.float32), "nested_code": ((256,), torch.float32), "offset": ((), torch.float32)}
        elif kind == "fp8":
            sizes.pop("zero_point")
        # int8 for all: modules ask a first parameter for the precision of activations, and skip integers
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """input (…,in) -> (…,out)."""
        bias = cast("Tensor | None", self.bias)
        if self.kind == "nf4":
            return _Dequantised.apply(input, self.weight, bias, self.out_features)  # pyright: ignore[reportReturnType]
        scale = cast(Tensor, self.scale)
        if self.kind == "int8":
            rows = input.reshape(-1, input.shape[-1])
            product = torch.mm(rows, self.weight.t().to(input.dtype)) * scale.to(input.dtype).flatten()
            output = product.reshape(*input.shape[:-1], self.out_features)
            return output if bias is None else output.add_(bias)
        output = torch.matmul(input, (self.weight.float() * scale).to(self.compute_dtype).t().to(input.dtype))
        return output if bias is None else output + bias


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' product: the weight is dequantised for the forward and again for the backward pass, and only its bytes are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        ctx.shape = width, x.shape[-1]
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


def read_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's weights in `dtype`, before they are quantised."""
    inner = {id(layer.weight): layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, MetaLinear)}
    return sum(inner.get(id(weight), weight.numel()) for weight in module.parameters()) * dtype.itemsize


def quantise_meta(module: nn.Module, kind: str) -> None:
    """Replace the linear layers of a module on the meta device, all that its library quantises, in place."""
    cast_weights(module, next(module.parameters()).dtype, _kept(module))
    for parent, name, layer in list(_layers(module, kind)):
        setattr(parent, name, MetaLinear(layer, kind))
