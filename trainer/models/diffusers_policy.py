"""A diffusers pipeline as a policy: denoiser, autoencoder and precision. Adapters, prompts and speed have files of their own.

A family's file subclasses it and states how its network is called and on which noise levels. Weights may be bfloat16;
adapters, noise levels and x0-predictions are float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Denoiser, classifier_free_guidance
from ..policy import ATTENTION, Lora, LoraLayout, initial_down
from ..runtime.hashes import module_hash
from ..sampling import Space, add_noise
from . import speed
from .adapters import Adapters
from .configs import ModelConfig
from .prompts import Conditioning, Prompts


@contextmanager
def without_dtype_warning() -> Generator[None]:
    """Silence diffusers' `torch_dtype` deprecation warning: older versions do not know the new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        yield


class DiffusersPolicy:
    """A diffusers pipeline as a trainer.policy.Trainable; families subclass it.

    `dtype` of the frozen weights: float32 or bfloat16. `image_size`: pixels, one number or (height, width); None is the
    model's own. With `offload` all modules stay on the CPU: encoders visit `device` while they run, `to` moves the rest there.
    """

    # -- what a family states --------------------------------------------------------------------------------------

    space: Space = "ve"
    lora_layout: LoraLayout = "kohya"
    pipeline_name: ClassVar[str]
    """The diffusers pipeline, as `model_index.json` names it."""
    network_name: ClassVar[str]
    """The pipeline's component that is trained."""
    published: ClassVar[Mapping[str, ModelConfig]] = {}
    """Configurations of published models by name."""
    targets: ClassVar[tuple[str, ...]] = ATTENTION
    """The attention projections' names, which a LoRA without explicit targets adapts."""
    blocks: ClassVar[tuple[str, ...]] = ()
    """Classes of the network's repeated blocks, which are compiled."""
    patch: ClassVar[int] = 1
    """Latents per side of one token."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's loaders."""
    index: ClassVar[Mapping[str, Any]] = {}
    """Entries of `model_index.json` besides the components."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Components that may be absent."""
    max_tokens: int | None = None
    """Limit of the text encoder's tokens; None is the tokenizer's own."""

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The name in `published` of a single-file checkpoint with tensors of these names and shapes, None if it is none of them.

        Raises ValueError for a checkpoint of this architecture that is not supported.
        """
        return None

    def native_size(self) -> int:
        """Latents per side that the model was trained at."""
        return int(self.network.config.sample_size)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Run the text encoders on `device`."""
        raise NotImplementedError

    def unconditional(self, n: int) -> Conditioning:
        """Text conditioning of n empty prompts, on the CPU."""
        return self.prompts.conditioning([""] * n)

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction (B,C,h,w) in float32 of states x at noise levels sigma (B,).

        x and the conditioning are on `device`, the conditioning in the network's dtype; sigma may be on the CPU.
        """
        raise NotImplementedError

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps+1,) on the CPU, the last one 0."""
        raise NotImplementedError

    # -- loading ---------------------------------------------------------------------------------------------------

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | tuple[int, int] | None = None,
        offload: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights in {dtype}: use float32 or bfloat16; float16 loses small reward gradients")
        self.device = torch.device(device)
        self.dtype = dtype
        self.pipeline = pipeline
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for module in modules:
            module.to("cpu" if offload else self.device).requires_grad_(False).eval()
            if any(p.dtype != dtype for p in module.parameters()):
                module.to(dtype)
        self.network: Any = getattr(pipeline, self.network_name)
        self.vae = pipeline.vae
        self.adapters = Adapters(self.network, self.targets)
        self.prompts = Prompts(self, [m for m in modules if m is not self.network and m is not self.vae])
        self.prompts.offload = offload
        self.lora: Lora | None = None
        self.merge_rollouts = False
        """Whether `merged` merges the adapter into the weights; float32 only, in bfloat16 small updates would be lost."""
        self.vae_slicing = False
        """Whether `decode` takes one image at a time, and keeps only its latent for the backward pass."""
        self.latent_shape = self._latent_shape(image_size)

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        import diffusers

        return getattr(diffusers, cls.pipeline_name)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any):
        """Load a diffusers folder of this family (weights from safetensors only); `options` as of the class."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
        return cls(cls.load_pipeline(folder, dtype), device, dtype, **options)

    @classmethod
    def load_pipeline(cls, folder: Path, dtype: torch.dtype) -> Any:
        """The pipeline of a diffusers folder."""
        with without_dtype_warning():
            return cls.pipeline_class().from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **cls.arguments)

    @property
    def vae_scale(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def unit(self) -> int:
        """Pixels of which both sides of an image must be multiples."""
        return self.vae_scale * self.patch

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what `latent_shape` decodes to."""
        return self.latent_shape[1] * self.vae_scale, self.latent_shape[2] * self.vae_scale

    def _latent_shape(self, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        channels = int(self.vae.config.latent_channels)
        if image_size is None:
            return channels, self.native_size(), self.native_size()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.unit or width % self.unit or min(height, width) < self.unit:
            raise ValueError(f"images of {width}×{height} pixels: this model takes multiples of {self.unit}")
        return channels, height // self.vae_scale, width // self.vae_scale

    # -- what is trained -------------------------------------------------------------------------------------------

    def add_lora(self, lora: Lora, seed: int = 0) -> None:
        """Attach the adapter that is trained, at first the identity; its random half depends on `seed` alone.

        A target is a module's whole name, or the last parts of one.
        """
        parameters = self.adapters.attach("tuned", lora)
        self.lora = lora
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "lora_A" in name:
                    parameter.copy_(initial_down(name, parameter.shape, lora.rank, seed))

    def tune_weights(self) -> None:
        """Train every parameter of the network instead of a LoRA; the originals stay in memory as the base model."""
        if self.adapters.original:
            return
        if self.dtype != torch.float32:
            # float32 masters beside bfloat16 weights would take the memory that float32 weights take
            raise ValueError("tune = full needs float32 weights: in bfloat16 an update below 1/256 of a weight is lost")
        if self.lora_layout != "kohya":
            raise ValueError("tune = full is for UNets (Stable Diffusion 1.x, 2.x, SDXL): ComfyUI's loader would lose biases of this model")
        for parameter in self.adapters.tune_weights().values():
            parameter.requires_grad_(True)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained LoRA's parameters by peft's names, or the tuned weights by their own."""
        return list(self.adapters.parameters().items())

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return list(self.adapters.parameters().values())

    # -- denoisers -------------------------------------------------------------------------------------------------

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0) -> Denoiser:
        """As in trainer.policy.Policy. Gradients reach x through every adapter, and parameters through `tuned` alone."""
        self.adapters.check(adapter)
        conditioning = self.prompts.conditioning(prompts)
        if guidance_scale != 1:
            empty = self.unconditional(len(prompts))
            conditioning = {key: torch.cat([value, empty[key]]) for key, value in conditioning.items()}
        uploaded = {key: value.to(self.device).to(self.dtype) for key, value in conditioning.items()}
        return PromptedDenoiser(self, adapter, guidance_scale, uploaded)

    def merged(self) -> AbstractContextManager[None]:
        """As in trainer.policy.Policy, where `merge_rollouts` is on."""
        return self.adapters.merging() if self.merge_rollouts and self.dtype == torch.float32 else nullcontext()

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The first state of a rollout from N(0,1): noise·√(1+σ₀²) in variance-exploding coordinates, the noise in flow."""
        first = self.sigmas(steps)[0]
        return noise.to(self.device) * ((1 + first.square()).sqrt() if self.space == "ve" else 1.0)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise."""
        return add_noise(x0, noise, sigma, self.space)

    # -- images ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32, of the scaled latents of images (B,3,H,W) in [0,1]."""
        with speed.on_device(self.image_encoder(), self.device, self.prompts.offload):
            posterior = self.vae.encode((images.to(self.device) * 2 - 1).to(self.vae.dtype)).latent_dist
        scale, shift = self._latent_scale()
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        if not torch.is_grad_enabled():
            pixels = self.image_size[0] * self.image_size[1]
            few = 1 if self.vae_slicing else max(1, 2**21 // pixels)  # eight of 512² are enough to keep a GPU busy
            return torch.cat([self._decode(part) for part in latents.split(few)])
        if not self.vae_slicing:
            return self._decode(latents)
        return torch.cat([checkpoint(self._decode, one, use_reentrant=False) for one in latents.split(1)])

    def _decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._latent_scale()
        pixels = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _latent_scale(self) -> tuple[float, float]:
        return float(self.vae.config.scaling_factor), float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def latents_depend_on(self) -> str:
        """Identifies everything that an image's latents depend on."""
        return f"{module_hash(self.vae)}/{self._latent_scale()}"

    # -- memory and speed ------------------------------------------------------------------------------------------

    def image_encoder(self) -> list[nn.Module]:
        """The autoencoder's modules that read images."""
        return [m for m in (self.vae.encoder, getattr(self.vae, "quant_conv", None)) if m is not None]

    def encoders(self) -> list[nn.Module]:
        """The modules that training does not need once prompts and images are encoded."""
        return [*self.prompts.encoders, *self.image_encoder()]

    def offload_encoders(self) -> None:
        """Keep the encoders on the CPU except while they run."""
        self.prompts.offload = True
        speed.move(self.encoders(), "cpu")

    def to(self, device: str | torch.device) -> None:
        """Move all modules to a device, except offloaded encoders."""
        self.device = torch.device(device)
        speed.move([self.network, self.vae, *([] if self.prompts.offload else self.prompts.encoders)], self.device)
        if self.prompts.offload:
            speed.move(self.image_encoder(), "cpu")

    def use_channels_last(self) -> None:
        """Store convolutions with channels as the fastest dimension, as tensor cores want them."""
        for module in (self.network, self.vae):
            module.to(memory_format=torch.channels_last)

    def compile(self, **options: Any) -> None:
        """torch.compile the network's blocks."""
        speed.compile_blocks(self.network, self.blocks, **options)

    def shard(self, mesh: Any) -> None:
        """Divide the network's frozen weights among processes, see speed.shard."""
        self.merge_rollouts = False  # which needs whole weights
        speed.shard(self.network, mesh)

    def gradient_checkpointing(self, *, denoiser: bool, vae: bool) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        speed.checkpoint_network(self.network, self.adapters, denoiser)
        speed.checkpoint_decoder(self.vae.decoder, vae)


@dataclass(frozen=True)
class PromptedDenoiser:
    """A policy's Denoiser; the conditioning, of B prompts or of B prompts and B empty ones, is on the device."""

    policy: DiffusersPolicy
    adapter: str
    guidance_scale: float
    conditioning: Conditioning

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B,C,h,w) and sigma (B,) -> x0-prediction (B,C,h,w), float32."""
        policy, adapters = self.policy, self.policy.adapters
        graph = torch.is_grad_enabled() and (self.adapter == "tuned" or x.requires_grad)
        x = x.to(policy.device)
        with adapters.using(self.adapter), torch.set_grad_enabled(graph):
            if graph and adapters.merged:
                raise RuntimeError("inside merged() no gradient reaches the adapter: evaluate under torch.no_grad()")
            if self.guidance_scale == 1:
                return policy.predict(x, sigma, self.conditioning)
            both = policy.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), self.conditioning)
            conditional, unconditional = both.chunk(2)
            return classifier_free_guidance(conditional, unconditional, self.guidance_scale)

    def rows(self, index: Tensor) -> PromptedDenoiser:
        """The denoiser of the prompts `index` (B',), which shares the uploaded conditioning."""
        if self.guidance_scale != 1:
            empty = len(next(iter(self.conditioning.values()))) // 2
            index = torch.cat([index, index + empty])
        return replace(self, conditioning={key: value[index] for key, value in self.conditioning.items()})
