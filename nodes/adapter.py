"""A LoRA beside ComfyUI's weights while it trains: which modules, the bypass, and what their forward passes need for it."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..trainer.lora.cosmos import from_cosmos

# Blocks whose activations are recomputed, by the names of ComfyUI's classes
DENOISER_BLOCKS = {
    *("ResBlock", "BasicTransformerBlock"),  # UNets, and the UNets of Stable Cascade
    *("JointBlock", "DoubleStreamBlock", "SingleStreamBlock"),  # SD3; FLUX, Chroma, Krea 2
    *("JointTransformerBlock", "OmniGen2TransformerBlock", "QwenImageTransformerBlock"),  # Lumina 2 and Z-Image, OmniGen 2, Qwen-Image
    *("HiDreamImageBlock", "MMDiTBlock", "DiTBlock", "PixArtMSBlock", "HunYuanDiTBlock"),  # HiDream, AuraFlow, PixArt, HunyuanDiT
    *("ErnieImageSharedAdaLNBlock", "Ideogram4TransformerBlock", "LensTransformerBlock", "BooguDoubleStreamBlock"),
    *("JoyImageTransformerBlock", "MMDiTBlockT2I", "PiTBlock", "TextFusionBlock"),  # JoyImage, PixelDiT, Krea 2
    "Block",  # Cosmos Predict2 and Anima
}
DECODER_BLOCKS = {"ResnetBlock", "AttnBlock", "Upsample", *("ResidualBlock", "AttentionBlock", "Resample")}  # the last three: Wan's


def lora_targets(model: Any) -> dict[str, tuple[str, set[str]]]:
    """Modules of `diffusion_model` by their name there: the name that a LoRA file uses, and all names to choose them by.

    UNets go by diffusers' names (kohya files). Others go by their own, which every ComfyUI loads, and may be chosen by
    diffusers' names too; a fused attention projection is chosen by any of its parts.
    """
    config = model.model_config.unet_config
    if "num_res_blocks" in config:
        names = comfy.utils.unet_to_diffusers(config)
        pairs = {there.removesuffix(".weight"): here.removesuffix(".weight") for here, there in names.items() if here.endswith(".weight")}
        return {inside: (name, {name}) for inside, name in pairs.items()}
    found = {name: (name, {name, from_cosmos(name)} - {""}) for name, _ in model.diffusion_model.named_modules() if name}
    for key, weight in comfy.lora.model_lora_keys_unet(model, {}).items():
        weight = weight[0] if isinstance(weight, tuple) else weight
        inside = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.startswith("transformer.") and inside in found:
            found[inside][1].add(key.removeprefix("transformer."))
    return found


class Adapter(nn.Module):
    """The two halves of one module's update, in float32."""

    def __init__(self, module: nn.Module, rank: int, device: torch.device) -> None:
        super().__init__()
        if isinstance(module, nn.Conv2d):
            down = torch.zeros(rank, module.in_channels, *module.kernel_size, device=device)
            up = torch.zeros(module.out_channels, rank, 1, 1, device=device)
        else:
            down = torch.zeros(rank, module.in_features, device=device)
            up = torch.zeros(module.out_features, rank, device=device)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor, module: Any) -> Tensor:
        """B(A x) for the input of `module`."""
        if isinstance(module, nn.Conv2d):
            return F.conv2d(F.conv2d(x, self.down, stride=module.stride, padding=module.padding, dilation=module.dilation), self.up)
        return F.linear(F.linear(x, self.down), self.up)


class OutOfPlace(TorchFunctionMode):
    """Inside, where a graph is recorded, `a += b` makes a new tensor; so do -=, *= and /=.

    ComfyUI's transformers add residuals in place, to tensors that autograd has saved for the backward pass. torch is called with
    `a.add_(b)` for `a += b`; a call that the source writes as such stays in place, since its result may not be used.
    """

    _WITHOUT: ClassVar[dict[Any, Any]] = {Tensor.add_: torch.add, Tensor.sub_: torch.sub, Tensor.mul_: torch.mul, Tensor.div_: torch.div}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        other = self._WITHOUT.get(func)
        if other is not None and torch.is_grad_enabled():
            caller = sys._getframe(1)
            if dis.opname[caller.f_code.co_code[caller.f_lasti]].startswith(("BINARY_OP", "INPLACE_")):
                return other(*args, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def decode_frame(module: Any, latents: Tensor) -> Tensor:
    """Pixels (B,3,H,W) of a video VAE's latents (B,C,1,h,w), by its decoder's parts.

    Older ComfyUIs decode the first frame with a memory for the next, which forbids recomputation.
    """
    if not (hasattr(module, "conv2") and hasattr(module, "decoder")):
        return module.decode(latents)[:, :, 0]
    pixels = module.decoder(module.conv2(latents))
    return (torch.cat(pixels, 2) if isinstance(pixels, list) else pixels)[:, :, 0]


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Any], Any]) -> Generator[None]:
    """Inside, `module.forward` is `make(forward)`."""
    before = module.__dict__.get("forward")
    module.forward = make(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def recomputed(
    network: nn.Module, blocks: set[str], prepared: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda forward: forward
) -> Generator[int]:
    """Inside, blocks of these classes keep no activations for the backward pass; `prepared(forward)` is what runs, both times.

    Yields the number of blocks.
    """

    def make(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(prepared(forward), *args, use_reentrant=False, **kwargs)

        return run

    found = [module for module in network.modules() if type(module).__name__ in blocks]
    with ExitStack() as stack:
        for module in found:
            stack.enter_context(replaced_forward(module, make))
        yield len(found)
