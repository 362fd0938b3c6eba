"""What is aligned, as objectives see it: a denoiser with adapters, and an image autoencoder."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .rng import generator
from .sampling import Space

LoraLayout = Literal["kohya", "diffusers", "original", "native"]
"""Layouts of LoRA files that a policy may be saved in, see lora/names.py."""


class Policy(Protocol):
    """A diffusion model under training. Latents are in the sampler's space and scaled to about unit variance."""

    @property
    def space(self) -> Space:
        """Which signal coefficient goes with a noise level."""
        ...

    @property
    def device(self) -> torch.device:
        """Where denoisers evaluate and latents are decoded."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,h,w) of one sample."""
        ...

    @property
    def adapters(self) -> Container[str]:
        """Names that `denoiser` takes: `base`, `tuned`, and those of other adapters that are loaded."""
        ...

    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        adapter: str = "tuned",
        guidance_scale: float = 1.0,
        negative: str = "",
        prompt_weight: float = 1.0,
    ) -> Denoiser:
        """The model with one adapter: `tuned` is the trained one, `base` is none.

        Gradients reach x with any adapter, and parameters with those that are trained. A guidance scale of 1 evaluates no unconditional
        branch, which is of the prompt `negative`. The conditional branch sees the embedding n + prompt_weight·(c − n) of the prompt's c
        and the negative's n: 1 is the prompt, 0 the negative. Raises ValueError for an adapter that is not loaded.
        """
        ...

    def reads_alike(self, prompt: str, other: str) -> bool:
        """Whether the text encoders see two prompts as one, such as texts that differ beyond their last token, or in case."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Around evaluations without gradient: merges the adapter into the weights where the policy can, so that it costs nothing.

        Results change by rounding only. The adapter must not be trained inside.
        """
        ...

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps+1,) in float32 on the CPU, the last one 0."""
        ...

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The first state of a rollout of `steps` steps from standard normal noise (B,C,h,w)."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise for sigma (B,)."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) in [0,1] -> mean and standard deviation (B,C,h,w) of their scaled latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W) in [0,1], differentiable."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer moves: the adapter alone."""
        ...


def with_companions(name: str, companions: Iterable[str]) -> tuple[str, ...]:
    """The name of an adapter or a file, and those of its companions: `tuned` and `tuned-loser`."""
    return name, *(f"{name}-{companion}" for companion in companions)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Names of the attention projections in UNets."""


@dataclass(frozen=True)
class Lora:
    """The adapter that is trained (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = field(default=8, metadata={"min": 1, "max": 1024, "help": "rank of the update"})
    alpha: float = field(default=8.0, metadata={"min": 1e-3, "max": 4096.0, "help": "the update is scaled by alpha/rank"})
    targets: tuple[str, ...] | None = field(
        default=None, metadata={"help": "names of the modules that are adapted, or their last parts; none: the attention projections"}
    )


class Trainable(Policy, Protocol):
    """A policy with a LoRA adapter that a run can attach, save and resume."""

    @property
    def lora(self) -> Lora | None:
        """The adapter attached, if any."""
        ...

    @property
    def trained(self) -> Sequence[str]:
        """Names of the adapters that gradients reach: `tuned`, and those beside it."""
        ...

    def add_lora(self, lora: Lora, seed: int = 0, trained: Sequence[str] = ("tuned",)) -> None:
        """Attach adapters that start as the identity, `tuned` and its companions; their random halves depend on `seed` alone."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained adapters' parameters by peft's names, `<module>.lora_A.default.weight`."""
        ...

    @property
    def lora_layout(self) -> LoraLayout:
        """The layout in which the adapter is saved."""
        ...

    def tune_weights(self) -> None:
        """Train every weight of the network instead of a LoRA. Raises ValueError where that is not possible."""
        ...

    def shard(self, mesh: Any) -> None:
        """Divide the frozen weights among the processes of a device mesh."""
        ...

    def gradient_checkpointing(self, *, denoiser: bool, vae: bool) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        ...


class AdapterSet(Container[str], Protocol):
    """The adapters of one network, by name."""

    def attach(self, name: str, lora: Lora, *, trained: bool = False) -> Mapping[str, nn.Parameter]:
        """Add a LoRA, at first the identity; returns its parameters by peft's names. One that is not `trained` is frozen."""
        ...

    def adaptable(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """The network's own linear and convolutional modules by name, adapted or not."""
        ...

    def network_weights(self) -> Mapping[str, nn.Parameter]:
        """The network's own parameters by name."""
        ...

    def tune_weights(self, names: Collection[str] | None = None, adapter: str = "tuned") -> Mapping[str, nn.Parameter]:
        """Make copies of the parameters `names` (default: all) an adapter; returns them by name."""
        ...

    @property
    def original(self) -> Mapping[str, nn.Parameter]:
        """The base version of the tuned parameters; empty with a LoRA."""
        ...


class Adaptable(Trainable, Protocol):
    """A policy that LoRA files, and the weight differences of full fine-tuning, can be loaded into."""

    @property
    def adapters(self) -> AdapterSet:
        """The adapters of its network."""
        ...


def initial_down(name: str, shape: Sequence[int], rank: int, seed: int) -> Tensor:
    """An adapter's random half, as the official code draws it: Gaussian with standard deviation 1/rank."""
    return torch.randn(tuple(shape), generator=generator(seed, "lora", name)) / rank


@torch.no_grad()
def initialise(named: Iterable[tuple[str, nn.Parameter]], lora: Lora, seed: int) -> None:
    """Draw the random halves of adapters by peft's names."""
    for name, parameter in named:
        if "lora_A" in name:
            parameter.copy_(initial_down(name, parameter.shape, lora.rank, seed))
