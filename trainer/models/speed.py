"""Memory and speed settings of a model's modules; none changes results but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import Adapters

_DECODER_PARTS = (
    *("ResnetBlock2D", "Attention", "Upsample2D"),
    "AutoencoderTinyBlock",
    *("QwenImageResidualBlock", "QwenImageAttentionBlock", "QwenImageResample"),
)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: str | torch.device, offload: bool = True) -> Generator[None]:
    """Inside, offloaded modules are on the device, afterwards on the CPU; without `offload` nothing is moved."""
    if not offload:
        yield
        return
    move(modules, device)
    try:
        yield
    finally:
        move(modules, "cpu")


def move(modules: Iterable[nn.Module], device: str | torch.device) -> None:
    """Modules to a device."""
    for module in modules:
        module.to(device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device. A blocking copy would make the CPU wait for all work queued on a GPU."""
    return values.to(device, non_blocking=device.type == "cuda")


def compile_blocks(network: nn.Module, blocks: Collection[str], **options: Any) -> None:
    """torch.compile the blocks whose class is in `blocks`, with its `options`; names of modules and parameters stay.

    One compilation serves all blocks of a class, and gradient checkpointing recomputes compiled blocks. Raises ValueError where
    the network has none.
    """
    chosen = [module for module in network.modules() if type(module).__name__ in blocks]
    if not chosen:
        raise ValueError(f"compile = true: the family names no block of {type(network).__name__}; give compile = false")
    limits: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    # each width, adapter and gradient mode is one program, and all blocks count as one function
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(limits, name, max(getattr(limits, name), 128))
    for module in chosen:
        module.compile(**options)


def shard(network: Any, mesh: Any) -> None:
    """Divide the frozen weights among the processes of `mesh` (FSDP2); a block is gathered while it runs, forward or backward.

    Adapters stay whole. Every process must call the network equally often.
    """
    from torch.distributed.fsdp import fully_shard

    classes = set(network._no_split_modules)
    blocks = [module for module in network.modules() if type(module).__name__ in classes]
    innermost = [block for block in blocks if not any(part in blocks for part in block.modules() if part is not block)]
    adapters = {p for name, p in network.named_parameters() if ".lora_" in name}
    for module in (*innermost, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)


def cast(module: nn.Module, dtype: torch.dtype, exact: Collection[str]) -> None:
    """Weights in `dtype`, those of submodules that are called one of `exact` in float32."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if set(exact) & set(name.split(".")) else dtype)


def recompute_network(network: Any, adapters: Adapters, enabled: bool) -> None:
    """Recompute the network's activations block by block in the backward pass."""
    if enabled:
        network.enable_gradient_checkpointing(partial(_checkpointed_block, adapters))
    else:
        network.disable_gradient_checkpointing()
    network.train(enabled)  # older diffusers checkpoints in training mode only; without dropout the mode changes nothing else


def _checkpointed_block(adapters: Adapters, block: nn.Module, *arguments: Any) -> Any:
    """A block whose activations are recomputed with the adapter of the forward pass, whichever is active by then."""
    adapter = adapters.active

    def forward(*arguments: Any) -> Any:
        with adapters.using(adapter, block):
            return block(*arguments)

    return checkpoint(forward, *arguments, use_reentrant=False)


def recompute_decoder(decoder: nn.Module, enabled: bool) -> None:
    """Recompute the activations of each part of an autoencoder's decoder in the backward pass.

    diffusers would recompute whole blocks, the last of which has three residual blocks at full resolution.
    """
    for module in decoder.modules():
        if type(module).__name__ in _DECODER_PARTS:
            module.__dict__.pop("forward", None)
            if enabled:
                module.forward = partial(_checkpointed_forward, module.forward)


def _checkpointed_forward(forward: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **more)
    return checkpoint(forward, *arguments, use_reentrant=False, **more)
