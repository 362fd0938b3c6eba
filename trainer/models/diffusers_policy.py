"""A diffusers pipeline as a policy, put together from adapters, prompts, an autoencoder, and memory and speed settings.

A family's file subclasses it and states how its network is called and on which noise levels. Weights may be bfloat16;
adapters, noise levels and x0-predictions are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..guidance import classifier_free_guidance
from ..policy import ATTENTION, Lora, LoraLayout, initialise
from ..sampling import Space, add_noise, start_at
from . import speed
from .adapters import Adapters
from .autoencoder import Autoencoder
from .configs import ModelConfig
from .prompted import PromptedDenoiser
from .prompts import Conditioning, Prompts
from .quantisation import NONE, Quantisation, has_quantised
from .quiet import without_dtype_warning


class DiffusersPolicy:
    """A diffusers pipeline as a trainer.policy.Trainable; families subclass it and state the attributes and methods up to `sigmas`.

    `dtype` of the frozen weights: float32 or bfloat16. `image_size`: pixels, one number or (height, width); None is the
    model's own. With `offload` all modules stay on the CPU: encoders visit `device` while they run, `to` moves the rest there.
    """

    space: Space = "ve"
    lora_layout: LoraLayout = "kohya"
    pipeline_name: ClassVar[str]  # the diffusers pipeline, as `model_index.json` names it
    network_name: ClassVar[str]  # the pipeline's component that is trained
    published: ClassVar[Mapping[str, ModelConfig]] = {}  # published models by name
    targets: ClassVar[tuple[str, ...]] = ATTENTION  # modules that a LoRA without explicit targets adapts
    blocks: ClassVar[tuple[str, ...]] = ()  # classes of the network's repeated blocks, which are compiled
    autoencoder_class: ClassVar[type[Autoencoder]] = Autoencoder
    patch: ClassVar[int] = 1  # latents per side of one token
    arguments: ClassVar[Mapping[str, Any]] = {}  # of the pipeline's loaders
    settings: ClassVar[tuple[str, ...]] = ()  # the pipeline's own, which its folder states
    index: ClassVar[Mapping[str, Any]] = {}  # entries of `model_index.json` besides the components
    split_files: ClassVar[bool] = False  # whether single files hold the network alone
    tiny_decoder: ClassVar[str] = ""  # the TAESD of its latents; none
    within: ClassVar[Mapping[str, str]] = {}  # components that the network's single file holds too, by the beginning of their names there
    more_tokenizers: ClassVar[tuple[str, ...]] = ()  # tokenizers without a text encoder of their own
    optional: ClassVar[tuple[str, ...]] = ()  # components that may be absent
    max_tokens: int | None = None  # of the text encoders; None is the tokenizer's limit

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The name in `published` of a single-file checkpoint with tensors of these shapes; None if it is none of them.

        Raises ValueError for a checkpoint of this architecture that is not supported.
        """
        return None

    def native_size(self) -> int:
        """Latents per side that the model was trained at."""
        return int(self.network.config.sample_size)

    def distilled(self) -> str:
        """What in the pipeline's configuration says that the model is distilled to few steps; "" where nothing does."""
        return ""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Run the text encoders on `device`."""
        raise NotImplementedError

    def unconditional(self, n: int) -> Conditioning:
        """Text conditioning of n empty prompts, on the CPU."""
        return self.prompts.conditioning([""] * n)

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction (B,C,h,w) in float32 of states x at noise levels sigma (B,).

        x and the conditioning are on `device`; its floating-point tensors are in the network's dtype, masks in their own. sigma may be on
        the CPU.
        """
        raise NotImplementedError

    def guided(self, x: Tensor, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """x0-prediction from those with and without the prompt, at states x; all (B,C,h,w)."""
        return classifier_free_guidance(conditional, unconditional, guidance_scale)

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps+1,) on the CPU, the last one 0."""
        raise NotImplementedError

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
        self.device, self.dtype, self.pipeline = torch.device(device), dtype, pipeline
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self.network: Any = getattr(pipeline, self.network_name)
        for module in modules:
            module.to("cpu" if offload else self.device).requires_grad_(False).eval()
            exact = getattr(module, "_keep_in_fp32_modules", None) if module is self.network else None
            if exact and not has_quantised(module):  # the loader of quantised weights has kept them
                speed.cast(module, dtype, exact)
            elif not has_quantised(module) and any(p.dtype != dtype for p in module.parameters()):
                module.to(dtype)
        self.vae = pipeline.vae
        self.autoencoder = self.autoencoder_class(self.vae)
        self.adapters = Adapters(self.network, self.targets)
        self.prompts = Prompts(self, [m for m in modules if m is not self.network and m is not self.vae], offload)
        self.lora: Lora | None = None
        self.trained: tuple[str, ...] = ("tuned",)
        self.quantised = has_quantised(self.network)
        self.quantisation = NONE  # the formats that its loader was given
        self.merge_rollouts = False  # without effect in bfloat16, where small updates would be lost, and on quantised weights
        self.latent_shape = self._latent_shape(image_size)

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        import diffusers

        if not hasattr(diffusers, cls.pipeline_name):
            raise ValueError(f"diffusers {diffusers.__version__} has no {cls.pipeline_name}: pip install --upgrade diffusers")
        return getattr(diffusers, cls.pipeline_name)

    @classmethod
    def assemble(cls, **parts: Any) -> Any:
        """The diffusers pipeline of these components and settings."""
        return cls.pipeline_class()(**parts)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any):
        """Load a diffusers folder of this family; `options` as of the class."""
        return cls(cls.load_pipeline(Path(folder), dtype), device, dtype, **options)

    @classmethod
    def load_pipeline(cls, folder: Path, dtype: torch.dtype, quantisation: Quantisation = NONE) -> Any:
        """The pipeline of a diffusers folder (weights from safetensors only)."""
        options = {**cls.arguments, **quantisation.arguments(folder / "model_index.json", dtype)}
        with without_dtype_warning():
            return cls.pipeline_class().from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **options)

    @property
    def unit(self) -> int:
        """Pixels of which both sides of an image must be multiples."""
        return self.autoencoder.downscaling * self.patch

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what `latent_shape` decodes to."""
        return self.latent_shape[1] * self.autoencoder.downscaling, self.latent_shape[2] * self.autoencoder.downscaling

    def _latent_shape(self, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        channels = self.autoencoder.channels
        if image_size is None:
            return channels, self.native_size(), self.native_size()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.unit or width % self.unit or min(height, width) < self.unit:
            raise ValueError(f"images of {width}×{height} pixels: this model takes multiples of {self.unit}")
        return channels, height // self.autoencoder.downscaling, width // self.autoencoder.downscaling

    def add_lora(self, lora: Lora, seed: int = 0, trained: Sequence[str] = ("tuned",)) -> None:
        """See trainer.policy.Trainable."""
        self.trained = tuple(trained)
        for adapter in trained:
            self.adapters.attach(adapter, lora, trained=True)
        self.lora = lora
        initialise(self.named_parameters(), lora, seed)

    def tune_weights(self) -> None:
        """Train every parameter of the network instead of a LoRA; the originals stay in memory as the base model."""
        if self.adapters.original:
            return
        if self.quantised:
            raise ValueError("tune = full needs weights that are not quantised: leave model_options.quantisation out, or train a LoRA")
        if self.dtype != torch.float32:
            # float32 masters beside bfloat16 weights would take the memory that float32 weights take
            raise ValueError("tune = full needs float32 weights: in bfloat16 an update below 1/256 of a weight is lost")
        if self.lora_layout != "kohya":
            raise ValueError("tune = full is for UNets (Stable Diffusion 1.x, 2.x, SDXL): ComfyUI's loader would lose biases of this model")
        for parameter in self.adapters.tune_weights().values():
            parameter.requires_grad_(True)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained LoRAs' parameters by peft's names, or the tuned weights by their own."""
        return [item for adapter in self.trained for item in self.adapters.parameters(adapter).items()]

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [parameter for _, parameter in self.named_parameters()]

    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        adapter: str = "tuned",
        guidance_scale: float = 1.0,
        negative: str = "",
        prompt_weight: float = 1.0,
    ) -> Denoiser:
        """See trainer.policy.Policy."""
        self.adapters.check(adapter)
        conditioning = self._conditioning(prompts, negative, prompt_weight)
        if guidance_scale != 1:
            empty = self._conditioning(prompts, negative, 0.0)
            conditioning = {key: torch.cat([value, empty[key]]) for key, value in conditioning.items()}
        # masks and token numbers are not the network's floating-point input: they keep their dtype
        uploaded = {k: v.to(self.device).to(self.dtype if v.is_floating_point() else v.dtype) for k, v in conditioning.items()}
        return PromptedDenoiser(self, adapter, guidance_scale, uploaded)

    def _conditioning(self, prompts: Sequence[str], negative: str, weight: float) -> Conditioning:
        """Text conditioning of n + weight·(c − n), on the CPU."""
        if weight == 1:
            return self.prompts.conditioning(prompts)
        empty = self.prompts.conditioning([negative] * len(prompts)) if negative else self.unconditional(len(prompts))
        if weight == 0:
            return empty
        given = self.prompts.conditioning(prompts)
        if "mask" in given:
            raise ValueError(
                f"prompt weight {weight:g}: {self.pipeline_name} masks its padding, so that two prompts have no sum; give 1 or 0"
            )
        return {key: (1 - weight) * empty[key] + weight * value if value.is_floating_point() else value for key, value in given.items()}

    def reads_alike(self, prompt: str, other: str) -> bool:
        """Whether all tokenizers cut two prompts to the same tokens."""
        return self.prompts.tokens(prompt) == self.prompts.tokens(other)

    def merged(self) -> AbstractContextManager[None]:
        """See trainer.policy.Policy; `merge_rollouts` switches it on."""
        return self.adapters.merging() if self.merge_rollouts and self.dtype == torch.float32 and not self.quantised else nullcontext()

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The first state of a rollout from N(0,1): noise·√(1+σ₀²) in variance-exploding coordinates, the noise in flow."""
        return start_at(noise.to(self.device), self.sigmas(steps)[0], self.space)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise."""
        return add_noise(x0, noise, sigma, self.space)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32, of the scaled latents of images (B,3,H,W) in [0,1]."""
        with speed.on_device(self.autoencoder.encoder, self.device, self.prompts.offload):
            return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        return self.autoencoder.decode(latents)

    def latents_depend_on(self) -> str:
        """Identifies all that an image's latents depend on."""
        return self.autoencoder.key()

    def encoders(self) -> list[nn.Module]:
        """The modules that training does not need once prompts and images are encoded."""
        return [*self.prompts.encoders, *self.autoencoder.encoder]

    def decoders(self) -> list[nn.Module]:
        """The autoencoder, and the small decoder of reward gradients where there is one."""
        return [self.vae, *([self.autoencoder.tiny] if isinstance(self.autoencoder.tiny, nn.Module) else [])]

    def to(self, device: str | torch.device) -> None:
        """Move all modules to a device, except offloaded encoders."""
        self.device = torch.device(device)
        speed.move([self.network, *self.decoders(), *([] if self.prompts.offload else self.prompts.encoders)], self.device)
        if self.prompts.offload:
            speed.move(self.autoencoder.encoder, "cpu")

    def use_channels_last(self) -> None:
        """Store convolutions with channels as the fastest dimension, as tensor cores want them."""
        for module in (self.network, *self.decoders()):
            for weight in module.parameters():
                if weight.ndim == 4:  # those of video autoencoders have 5
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def compile(self, **options: Any) -> None:
        """torch.compile the network's blocks."""
        speed.compile_blocks(self.network, self.blocks, **options)

    def shard(self, mesh: Any) -> None:
        """Divide the network's frozen weights among processes, see speed.shard."""
        self.merge_rollouts = False  # which needs whole weights
        speed.shard(self.network, mesh)

    def gradient_checkpointing(self, *, denoiser: bool, vae: bool) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        speed.recompute_network(self.network, self.adapters, denoiser)
        for decoder in self.decoders():
            speed.recompute_decoder(decoder, vae)
