"""A ComfyUI MODEL and VAE as what the trainer aligns. ComfyUI loads and evaluates; the adapter is ours while training.

The adapter is a bypass, y + s·B(A x): frozen weights, quantised or not, are never touched, and the base model is the same
network with the bypass closed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..trainer.denoiser import Denoiser
from ..trainer.guidance import classifier_free_guidance
from ..trainer.lora import names
from ..trainer.policy import ATTENTION, Lora, LoraLayout, initialise
from ..trainer.sampling import Space, add_noise, leading_timesteps, trailing_timesteps
from .adapter import DECODER_BLOCKS, DENOISER_BLOCKS, Adapter, OutOfPlace, decode_frame, lora_targets, recomputed, replaced_forward
from .autograd import differentiable_kernels, make_trainable_through, refuse_switch, require_whole, resident, resident_vae
from .conditioning import Conditioning, Prompts

_OF_FRAMES = ("QwenImage", "Krea2", "Anima")  # ComfyUI's classes of image models that have a video model's latents
_PIXELS_AT_ONCE = 2**20  # decoded without gradient: four images of 512², or one of 1024²


class ComfyPolicy:
    """MODEL, VAE and a way to condition on a prompt, as a trainer.policy.Trainable.

    Use it inside `loaded()`. `latent_shape` is (C,h,w); `gradient_vae` decodes where gradients are needed (a TAESD, say).
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        condition: Callable[[str], Conditioning],
        latent_shape: tuple[int, int, int],
        gradient_vae: Any = None,
    ) -> None:
        refuse_switch(model)
        dimensions = getattr(model.get_model_object("latent_format"), "latent_dimensions", 2)
        self._frames = type(model.model).__name__ in _OF_FRAMES and dimensions == 3  # latents are (B,C,1,h,w)
        if dimensions != 2 and not self._frames:
            raise ValueError("this model draws video or sound: reward training knows images only")
        self.model, self.vae = resident(model), resident_vae(vae)
        self.gradient_vae = resident_vae(gradient_vae) if gradient_vae else self.vae
        if self._frames and any(getattr(part, "latent_dim", 3) != 3 for part in (vae, gradient_vae) if part is not None):
            raise ValueError("this model's latents are those of Qwen-Image's VAE: connect that one (qwen_image_vae.safetensors)")
        self.latent_shape = latent_shape
        self.device = model.load_device
        if model.model.get_dtype() == torch.float16 and hasattr(model, "set_model_compute_dtype"):
            # reward gradients inside the network are too small for fp16, and vanish without a word
            self.model = self.model.clone()
            wide = torch.bfloat16 if comfy.model_management.should_use_bf16(self.device) else torch.float32
            self.model.set_model_compute_dtype(wide)
        self.prompts = Prompts(self.model.model, condition, self.device)
        self.reads_alike = self.prompts.alike
        self._sampling, self._levels = self.model.get_model_object("model_sampling"), dict[int, Tensor]()
        self.space: Space = "flow" if isinstance(self._sampling, comfy.model_sampling.CONST) else "ve"
        self.lora: Lora | None = None
        self.trained: tuple[str, ...] = ("tuned",)
        self.adapters = frozenset({"base", "tuned"})
        self._modules: dict[tuple[str, str], tuple[str, Adapter]] = {}  # by adapter and name in files: name inside the model, halves
        self._active, self._checkpointed = "tuned", (False, True)
        self.slicing = False  # whether images are decoded one at a time, and only their latents kept for the backward pass

    # -- the adapter ---------------------------------------------------------------------------------------------

    def add_lora(self, lora: Lora, seed: int = 0, trained: Sequence[str] = ("tuned",)) -> None:
        """Attach adapters that start as the identity; their random halves depend on `seed` alone."""
        if self.lora is not None:
            raise ValueError("this policy has an adapter already")
        targets = ATTENTION if lora.targets is None else lora.targets
        modules = dict(self.model.model.diffusion_model.named_modules())
        for inside, (name, aliases) in sorted(lora_targets(self.model.model).items(), key=lambda item: item[1][0]):
            wanted = any(alias == target or alias.endswith("." + target) for alias in aliases for target in targets)
            if wanted and isinstance(modules.get(inside), nn.Linear | nn.Conv2d):
                for adapter in trained:
                    self._modules[adapter, name] = inside, Adapter(modules[inside], lora.rank, self.device)
        if not self._modules:
            raise ValueError(f"no module of this model is called {', '.join(targets)}: nothing to train")
        self.lora, self.trained, self.adapters = lora, tuple(trained), frozenset({"base", *trained})
        initialise(self.named_parameters(), lora, seed)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapters' parameters by peft's names."""
        named = ((names.parameter(name, adapter), halves) for (adapter, name), (_, halves) in self._modules.items())
        return [pair for keys, halves in named for pair in zip(keys, (halves.down, halves.up))]

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for _, p in self.named_parameters()]

    @property
    def lora_layout(self) -> LoraLayout:
        """kohya names for UNets, ComfyUI's generic ones for the others."""
        return "kohya" if "num_res_blocks" in self.model.model.model_config.unet_config else "native"

    def tune_weights(self) -> None:
        """Refused: ComfyUI's weights may be quantised."""
        raise ValueError("tune = full: in a graph an adapter is trained; `python -m trainer train` trains every weight")

    def shard(self, mesh: Any) -> None:
        """Refused: a graph is one process."""
        raise ValueError("a graph trains in one process: launch `python -m trainer train` for several")

    def gradient_checkpointing(self, *, denoiser: bool, vae: bool) -> None:
        """Recompute activations block by block; the decoder, which is the peak of memory, always does."""
        self._checkpointed = (denoiser, True)

    # -- loading -------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, others: Sequence[Any], batch: int) -> Generator[None]:
        """Models on their device, weights fit for autograd, adapters attached; all is as before afterwards.

        `others` are patchers to load as well (rewards).
        """
        management = comfy.model_management
        shape = [2 * batch, self.latent_shape[0], *([1] if self._frames else []), *self.latent_shape[1:]]
        needed = 4 * self.model.model.memory_required(shape) + self.gradient_vae.memory_used_decode(shape, self.gradient_vae.vae_dtype)
        vaes = [self.vae.patcher] + ([self.gradient_vae.patcher] if self.gradient_vae is not self.vae else [])
        management.load_models_gpu([self.model, *vaes, *others], memory_required=needed, force_full_load=True)
        require_whole(self.model, *vaes)  # before a weight is replaced: ComfyUI has locked the memory of those that it streams
        for module in (self.model.model, self.vae.first_stage_model, self.gradient_vae.first_stage_model, *(p.model for p in others)):
            make_trainable_through(module)
        with ExitStack() as stack:
            stack.enter_context(differentiable_kernels())
            self.model.pre_run()
            stack.callback(self.model.cleanup)
            stack.enter_context(self.attached())
            try:
                yield
            finally:
                for parameter in self.parameters():
                    parameter.grad = None
                management.soft_empty_cache()

    @contextmanager
    def attached(self) -> Generator[None]:
        """Inside, the denoiser's modules have their adapters, and blocks are recomputed as `gradient_checkpointing` says."""
        network = self.model.model.diffusion_model
        modules = dict(network.named_modules())
        with ExitStack() as stack:
            for (name, _), (inside, halves) in self._modules.items():
                stack.enter_context(
                    replaced_forward(modules[inside], lambda inner, m=modules[inside], a=halves, n=name: self._bypass(inner, m, a, n))
                )
            if self._checkpointed[0] and not stack.enter_context(recomputed(network, DENOISER_BLOCKS, self._with_present_adapter)):
                raise ValueError(f"no block of {type(network).__name__} can be recomputed: switch gradient_checkpointing off")
            stack.enter_context(recomputed(self.gradient_vae.first_stage_model, DECODER_BLOCKS))
            yield

    def _bypass(self, inner: Callable[..., Tensor], module: nn.Module, adapter: Adapter, name: str) -> Callable[..., Tensor]:
        assert self.lora is not None
        scale = self.lora.alpha / self.lora.rank

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = inner(x, *args, **kwargs)
            return output + (scale * adapter(x.float(), module)).to(output.dtype) if self._active == name else output

        return forward

    # -- denoisers -----------------------------------------------------------------------------------------------

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0, **others: Any) -> Denoiser:
        """The model with a trained adapter or `base`; a guidance scale of 1 evaluates no unconditional branch, else that of the graph."""
        if others.get("negative") or others.get("prompt_weight", 1) != 1:
            raise ValueError("a model in a graph has the negative prompt that is connected, and no prompt weight")
        if adapter not in self.adapters:
            raise ValueError(f"no adapter {adapter!r} in a graph: use one of {', '.join(sorted(self.adapters))}")
        return ComfyDenoiser(self, adapter, tuple(prompts), guidance_scale)

    @contextmanager
    def bypassing(self, adapter: str) -> Generator[None]:
        """Inside, the bypass of that adapter alone is open, of `base` none; afterwards it is as before."""
        before, self._active = self._active, adapter
        try:
            yield
        finally:
            self._active = before

    def _with_present_adapter(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that, computed again, runs with the adapter of now, whichever is active by then."""
        adapter = self._active

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.bypassing(adapter), OutOfPlace():
                return forward(*args, **kwargs)

        return run

    def merged(self) -> nullcontext[None]:
        """Does nothing: ComfyUI's weights may be quantised, and are never changed."""
        return nullcontext()

    def predict(self, x: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        """x0-prediction of the network with the adapter as it is."""
        options = dict(self.model.model_options.get("transformer_options", {}))
        # the default splits attention by the memory that is free, which recomputation would find changed
        options["optimized_attention_override"] = lambda _, *a, **k: comfy.ldm.modules.attention.attention_pytorch(*a, **k)
        found: list[Tensor | None] = [None] * len(x)
        x = self.framed(x)
        with OutOfPlace():
            for rows, arguments in self.prompts.grouped(prompts, x):
                whole = len(rows) == len(x)
                levels, states = (sigma, x) if whole else (torch.stack([part[i] for i in rows]) for part in (sigma, x))
                predicted = self.model.model.apply_model(states, levels, transformer_options=options, **arguments).float()
                predicted = predicted.squeeze(2) if self._frames else predicted
                if whole:
                    return predicted
                for i, row in zip(rows, predicted):
                    found[i] = row
        return torch.stack([row for row in found if row is not None])

    def framed(self, latents: Tensor) -> Tensor:
        """Latents (B,C,h,w) as ComfyUI has them."""
        return latents.unsqueeze(2) if self._frames else latents

    # -- noise levels and pixels ---------------------------------------------------------------------------------

    def sigmas(self, steps: int) -> Tensor:
        """The `leading` grid on models with a table of levels, `trailing` for zero terminal SNR; ComfyUI's `simple` one on flow models."""
        if steps not in self._levels:  # both are read from the GPU: once, not at every training step
            table = getattr(self._sampling, "sigmas", None)
            if self.space == "ve" and isinstance(table, Tensor):
                spaced = trailing_timesteps if getattr(self._sampling, "zsnr", False) else leading_timesteps
                levels = torch.nn.functional.pad(table.cpu()[torch.tensor(spaced(steps, len(table)))], (0, 1))
            else:
                levels = comfy.samplers.calculate_sigmas(self._sampling, "simple", steps)
            self._levels[steps] = levels.float().cpu()
        return self._levels[steps].clone()

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """N(0,1) at the first level: noise·√(1+σ₀²) in variance-exploding coordinates, the noise itself in flow."""
        noise = noise.to(self.device)
        return noise * (1 + self.sigmas(steps)[0].square()).sqrt() if self.space == "ve" else noise

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise."""
        return add_noise(x0, noise, sigma, self.space)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents of images (B,3,H,W) in [0,1]: ComfyUI gives the posterior's mean, so the deviation is 0."""
        pixels = images.movedim(1, -1)
        # several images at once would be a video
        own = torch.cat([self.vae.encode(one) for one in pixels.split(1)]) if self._frames else self.vae.encode(pixels)
        latents = self.model.model.process_latent_in(own).to(self.device).float()
        latents = latents.squeeze(2) if self._frames else latents
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        if torch.is_grad_enabled():
            if not self.slicing:
                return self._decode(self.gradient_vae, latents)
            return torch.cat([checkpoint(self._decode, self.gradient_vae, one, use_reentrant=False) for one in latents.split(1)])
        pixels = latents.shape[-2] * latents.shape[-1] * 64  # of the usual eight pixels per latent and side
        return torch.cat([self._decode(self.vae, part) for part in latents.split(max(1, _PIXELS_AT_ONCE // pixels))])

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        unscaled = self.model.model.process_latent_out(self.framed(latents)).to(vae.vae_dtype).to(vae.device)
        pixels = decode_frame(vae.first_stage_model, unscaled) if self._frames else vae.first_stage_model.decode(unscaled)
        return (pixels.float().to(self.device) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class ComfyDenoiser:
    """A ComfyPolicy's Denoiser."""

    policy: ComfyPolicy
    adapter: str
    prompts: tuple[str, ...]
    guidance_scale: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B,C,h,w) and sigma (B,) -> x0-prediction (B,C,h,w) in float32."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        policy = self.policy
        graph = torch.is_grad_enabled() and (self.adapter in policy.trained or x.requires_grad)
        x, sigma = x.to(policy.device), sigma.to(policy.device)
        with policy.bypassing(self.adapter), torch.set_grad_enabled(graph):
            if self.guidance_scale == 1:
                return policy.predict(x, sigma, self.prompts)
            both = policy.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), [*self.prompts, *[""] * len(self.prompts)])
            return classifier_free_guidance(*both.chunk(2), self.guidance_scale)

    def rows(self, index: Tensor) -> ComfyDenoiser:
        """The denoiser of the prompts `index` (B',)."""
        return replace(self, prompts=tuple(self.prompts[i] for i in index.tolist()))
