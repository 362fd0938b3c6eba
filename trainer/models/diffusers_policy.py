"""What every policy over a diffusers pipeline shares: adapters, prompts, guidance, pixels and precision.

It does not know how a network is asked for its prediction, nor on which grid its noise levels lie: a family's file says
that. Weights may be bfloat16; adapters, noise levels and x0-predictions are float32.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.cache import TensorCache, key_of
from ..denoiser import Denoiser, classifier_free_guidance
from ..policy import AdapterState, Lora, LoraLayout, initial_down
from ..runtime.hashes import module_hash
from ..runtime.processes import ALONE, Processes
from ..runtime.progress import slow
from ..sampling import Space, add_noise
from .full_tuning import Versions, places

Conditioning = dict[str, Tensor]
"""What a network is told of B prompts: tensors (B, …) by name, `encoder_hidden_states` (B,tokens,width) among them."""

# What a text encoder's configuration says that its output does not depend on; the precision is the weights' own
_UNREAD = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
EMBEDDINGS_KEPT = 2 << 30  # bytes of embeddings in memory that also lie in a cache
TRAINED = "default"  # peft's own name for a first adapter, which parameter names carry


@contextmanager
def without_dtype_warning() -> Generator[None]:
    """Inside, diffusers says nothing of the argument `torch_dtype`: its new name is unknown to older versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        yield


class DiffusersPolicy:
    """A diffusers pipeline as a trainer.policy.Trainable; families subclass it.

    `image_size`: pixels, one number or (height, width); None is what the model was made for. `dtype`: of all frozen
    weights, float32 or bfloat16.
    """

    space: Space = "ve"
    lora_layout: LoraLayout = "kohya"
    targets: ClassVar[tuple[str, ...]] = Lora().targets
    """What Lora's default targets, the attention projections, are called in this family."""
    repeated: ClassVar[tuple[str, ...]] = ()
    """Classes of the blocks that a network is made of."""
    patch: ClassVar[int] = 1
    """Latents per side that the network takes as one token."""

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights in {dtype}: use float32 or bfloat16; float16 loses small reward gradients")
        self.device = torch.device(device)
        self.dtype = dtype  # of the network's arithmetic
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(self.device).requires_grad_(False).eval()
                if any(p.dtype != dtype for p in part.parameters()):
                    part.to(dtype)
        self.network: Any = self._network(pipeline)
        self.vae = pipeline.vae
        self.lora: Lora | None = None
        self.states: frozenset[AdapterState] = frozenset({"base"})
        self.merges = False
        """Whether `merged` folds the adapter into the frozen weights."""
        self.slices_decoder = False
        """Whether `decode` takes one image at a time, and keeps nothing of it for the backward pass but its latent."""
        self._state: str = TRAINED
        self._folded: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []  # module, its own weight, weight with the adapter inside
        self._parked = False
        self._versions: Versions | None = None
        self._embeddings: dict[str, Conditioning] = {}
        self._stored: dict[str, tuple[TensorCache, str]] = {}  # where prompts lie that need not be in memory
        self._held: deque[str] = deque()  # those of them that are, oldest first
        self.latent_shape: tuple[int, int, int] = self._latent_shape(image_size)

    # -- what a family says ----------------------------------------------------------------------------------------

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        raise NotImplementedError

    @staticmethod
    def _network(pipeline: Any) -> Any:
        """The module of a pipeline that is aligned."""
        raise NotImplementedError

    def _native_size(self) -> int:
        """Latents per side that the model was made for."""
        raise NotImplementedError

    def _encode_prompts(self, prompts: list[str]) -> Conditioning:
        raise NotImplementedError

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction (B,C,h,w) in float32 of states x under noise levels sigma (B,)."""
        raise NotImplementedError

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps+1,), the last one 0."""
        raise NotImplementedError

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | tuple[int, int] | None = None,
    ):
        """Load a diffusers folder of this family (weights from safetensors only)."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        return cls(cls.load_pipeline(folder, dtype), device, dtype, image_size)

    @classmethod
    def load_pipeline(cls, folder: Path, dtype: torch.dtype) -> Any:
        """The pipeline of a diffusers folder."""
        with without_dtype_warning():
            return cls.pipeline_class().from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **cls.load_arguments())

    @classmethod
    def load_arguments(cls) -> dict[str, Any]:
        """Arguments for the pipeline's loaders: what of a model is not needed."""
        return {}

    def _latent_shape(self, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels = int(self.vae.config.latent_channels)
        if image_size is None:
            return channels, self._native_size(), self._native_size()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        unit = self.unit
        if height % unit or width % unit or min(height, width) < unit:
            raise ValueError(f"images of {width}×{height} pixels: this model takes multiples of {unit}")
        return channels, height // factor, width // factor

    @property
    def unit(self) -> int:
        """Pixels of which both sides of a picture must be multiples."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) * self.patch

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what `latent_shape` decodes to."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    # -- adapters --------------------------------------------------------------------------------------------------

    def add_lora(self, lora: Lora, seed: int = 0) -> None:
        """Attach an adapter that starts as the identity; its random half depends on `seed` alone.

        A target is a module's whole name, or the end of one. Lora's default targets stand for the family's own.
        """
        if self.tuned:
            raise ValueError("this policy has an adapter already")
        targets = self.targets if lora.targets == Lora().targets else lora.targets
        self.attach(TRAINED, Lora(lora.rank, lora.alpha, targets))
        self.lora = replace(lora, targets=targets)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(initial_down(name, parameter.shape, lora.rank, seed))

    def add_consistency(self, lora: Lora) -> dict[str, nn.Parameter]:
        """Attach the frozen adapter of the state `consistency`; returns its parameters by peft's names, to be filled."""
        if "consistency" in self.states:
            raise ValueError("this policy has a consistency adapter already")
        if self._versions is not None:
            raise ValueError("a consistency adapter is attached before the weights are tuned")  # peft freezes all it finds
        with self._flags_kept():
            self.attach("consistency", lora)
            self._activate(TRAINED)
        self.states = frozenset({"base", "consistency"})
        found = self.adapter_parameters("consistency")
        for parameter in found.values():
            parameter.requires_grad_(False)
        return found

    def tune_whole(self) -> None:
        """Train every parameter of the network instead of an adapter; the originals stay beside them, as the state `base`."""
        if self.dtype != torch.float32:
            # float32 masters beside bfloat16 weights would take the memory that float32 weights take
            raise ValueError("tune = full needs float32 weights: in bfloat16 an update below 1/256 of a weight is lost")
        if self.lora_layout != "kohya":
            raise ValueError("tune = full is for UNets (Stable Diffusion 1.x, 2.x, SDXL): ComfyUI's loader would lose biases of this model")
        for parameter in self.add_version().values():
            parameter.requires_grad_(True)

    def add_version(self, names: Collection[str] | None = None) -> dict[str, nn.Parameter]:
        """A tuned version of the network's parameters `names` (all without), equal to the originals as yet, by name."""
        if self.tuned:
            raise ValueError("this policy has an adapter already")
        self._versions = Versions(self.network, names)
        return self._versions.tuned

    def whole_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters of the network in its present state, without adapters."""
        return [(name, module.get_parameter(key)) for name, module, key in places(self.network)]

    @property
    def original(self) -> dict[str, nn.Parameter]:
        """The base model's version of what `named_parameters` names; empty where an adapter is trained."""
        return self._versions.original if self._versions else {}

    @property
    def tuned(self) -> bool:
        """Whether there is a tuned model beside the base."""
        return self.lora is not None or self._versions is not None

    def attach(self, name: str, lora: Lora) -> None:
        """Put an adapter of that name into the network and switch it on; its weights are float32, B is zero."""
        from peft import LoraConfig

        chosen = self._modules_called(lora.targets)
        if not chosen:
            raise ValueError(f"no module of this model is called {', '.join(lora.targets)}: nothing to train")
        alpha: Any = lora.alpha  # peft computes with any number, and types it int
        pattern = "|".join(re.escape(module) for module in chosen)  # exact: a list would match endings of other names too
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is wanted
            self.network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=True), name)
        for layer in self.network.modules():
            for side in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
                if name in side:  # peft leaves a second adapter on the CPU where the first one lies on the meta device
                    side[name].to(layer.base_layer.weight.device, torch.float32)

    def _modules_called(self, targets: Sequence[str]) -> list[str]:
        modules = self.adaptable()
        whole = {t for t in targets if t in modules}
        ends = tuple("." + t for t in targets if t not in whole)
        return [name for name in modules if name in whole or name.endswith(ends)]

    def adaptable(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """The network's own linear and convolutional modules by name, adapted or not."""
        found = ((n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in n)
        return {name.removesuffix(".base_layer"): module for name, module in found}

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by peft's names."""
        marks = (f".lora_A.{name}.", f".lora_B.{name}.")
        return {n: p for n, p in self.network.named_parameters() if any(mark in n for mark in marks)}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained adapter's parameters with peft's names, or the network's tuned ones with their own."""
        if self._versions is not None:
            return list(self._versions.tuned.items())
        return list(self.adapter_parameters(TRAINED).items())

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for _, p in self.named_parameters()]

    @contextmanager
    def adapter(self, state: AdapterState) -> Generator[None]:
        """Another state of the network inside the block; afterwards the one before."""
        if state not in self.states:
            raise ValueError("no consistency adapter is loaded: give one in `consistency`, or let the base model estimate")
        before, folded = self._state, self._folded
        self._unfold()
        with self._flags_kept():
            self._activate(state)
        try:
            yield
        finally:
            with self._flags_kept():
                self._activate(before)
            self._fold(folded)

    @contextmanager
    def merged(self) -> Generator[None]:
        """Inside, the adapter that is on lies in the frozen weights: no gradient reaches it, and an evaluation with one is refused.

        The weights are not computed back afterwards, their originals are kept: one more copy of the adapted matrices. In
        bfloat16 nothing is done: an entry that the update moves by less than half of its last digit would not move at all.
        """
        if self.merges and self.dtype == torch.float32 and not self._folded and self._state != "base":
            self._fold(self._with_adapter(self._state))
            try:
                yield
            finally:
                self._unfold()
        else:
            yield

    @torch.no_grad()
    def _with_adapter(self, name: str) -> list[tuple[nn.Module, nn.Parameter, nn.Parameter]]:
        """Every module of an adapter with its weight W and W + s·BA."""
        return [
            (module, module.weight, nn.Parameter(module.weight + layer.get_delta_weight(name), requires_grad=False))
            for layer in self._tuners()
            if name in layer.lora_A
            for module in [layer.get_base_layer()]
        ]

    def _fold(self, folded: list[tuple[nn.Module, nn.Parameter, nn.Parameter]]) -> None:
        if folded:
            for module, _, weight in folded:
                module.weight = weight
            with self._flags_kept():
                for layer in self._tuners():
                    layer.enable_adapters(False)
            self._folded = folded

    def _unfold(self) -> None:
        if self._folded:
            for module, weight, _ in self._folded:
                module.weight = weight
            self._folded = []
            with self._flags_kept():
                self._activate(self._state)

    def _tuners(self) -> list[Any]:
        """peft's layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self.network.modules() if isinstance(layer, BaseTunerLayer)]

    def _activate(self, state: str) -> None:
        """Switch on one adapter wherever it is, and no other; `base` has none."""
        self._state = state
        if self._versions is not None:
            self._versions.show(tuned=state == TRAINED)
        for layer in self._tuners():
            layer.enable_adapters(state != "base")
            if state != "base":
                layer.set_adapter(state)

    @contextmanager
    def _flags_kept(self) -> Generator[None]:
        """What is trained stays what is trained: peft's own switches set requires_grad as they like."""
        flags = [(p, p.requires_grad) for n, p in self.network.named_parameters() if ".lora_" in n]
        yield
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    # -- denoisers -------------------------------------------------------------------------------------------------

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0) -> Denoiser:
        """The tuned model; guidance 1 evaluates no unconditional branch."""
        cond = self.conditioning(prompts)
        uncond = self.unconditional(len(prompts)) if guidance_scale != 1 else None

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            if self._folded and torch.is_grad_enabled():
                raise RuntimeError("inside merged() no gradient reaches the adapter: evaluate under torch.no_grad()")
            x, sigma = x.to(self.device), sigma.to(self.device)
            if uncond is None:
                return self._predict(x, sigma, cond)
            both = {key: torch.cat([value, uncond[key]]) for key, value in cond.items()}
            conditional, unconditional = self._predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return classifier_free_guidance(conditional, unconditional, guidance_scale)

        def rows(index: Tensor) -> Denoiser:
            return self.denoiser([prompts[int(i)] for i in index], adapter=adapter, guidance_scale=guidance_scale)

        found: Any = denoise
        if adapter == "tuned" or not self.tuned:
            found.rows = rows
            return found

        # without gradient: a checkpointed forward is computed again in whatever state the adapter has by then
        @torch.no_grad()
        def other(x: Tensor, sigma: Tensor) -> Tensor:
            with self.adapter(cast(AdapterState, adapter)):
                return denoise(x, sigma)

        found = other
        found.rows = rows
        return found

    def prepare(self, prompts: Sequence[str], cache: TensorCache | None = None, processes: Processes = ALONE) -> None:
        """Encode prompts: afterwards `conditioning` knows them without text encoders, which need not run for those in `cache`.

        What is known waits in host memory (T5's are 4 MB a prompt), or in `cache`, of which EMBEDDINGS_KEPT bytes are held.
        """
        missing = sorted({p for p in prompts if p not in self._embeddings and p not in self._stored})
        if not missing:
            return
        if cache is None:
            self._embeddings.update(zip(missing, self._encoded(missing)))
        else:
            keys = self._prompt_keys(missing)
            cache.fill(keys, lambda part: self._encoded([missing[i] for i in part]), processes)
            self._stored.update({prompt: (cache, key) for prompt, key in zip(missing, keys)})

    def _embedding(self, prompt: str) -> Conditioning:
        """What the network is told of a prompt that is known, on the CPU."""
        if prompt not in self._embeddings:
            cache, key = self._stored[prompt]
            found = cache.read(key) or self._encoded([prompt])[0]  # its file may have been removed since
            self._embeddings[prompt] = found
            self._held.append(prompt)
            size = sum(value.nbytes for value in found.values())
            while len(self._held) > max(1, EMBEDDINGS_KEPT // size):
                self._embeddings.pop(self._held.popleft(), None)
        return self._embeddings[prompt]

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> list[Conditioning]:
        """What the network is told of each prompt, on the CPU. Each is encoded alone: in a batch its rounding would depend on
        the others, and a resumed run meets its prompts in other company."""
        with self._unparked(self.text_encoders()):
            return [
                {key: value[0].cpu() for key, value in self._encode_prompts([prompt]).items()}
                for prompt in slow(prompts, "encoding prompts")
            ]

    def _prompt_keys(self, prompts: Sequence[str]) -> list[str]:
        """Cache keys of prompts: text, tokens, the encoders' weights and configurations, the family and its limit of tokens."""
        parts: dict[str, Any] = {name: part for name, part in sorted(self.pipeline.components.items()) if part is not None}
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
        tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer")]
        configs = {name: {k: v for k, v in part.config.to_dict().items() if k not in _UNREAD} for name, part in encoders.items()}
        model = [type(self).__name__, str(getattr(self, "max_tokens", None)), json.dumps(configs, sort_keys=True, default=str)]
        model += [f"{name} {module_hash(part)}" for name, part in encoders.items()]

        def tokens(prompt: str) -> str:
            return str([(t.pad_token_id, t.model_max_length, t(prompt, verbose=False).input_ids) for t in tokenizers])

        return [key_of("prompt", prompt, tokens(prompt), *model) for prompt in prompts]

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the network is told of B prompts; each distinct prompt is encoded once in the policy's life."""
        self.prepare(prompts)
        rows = [self._embedding(p) for p in prompts]
        return {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}

    def unconditional(self, n: int) -> Conditioning:
        """The same for n empty prompts."""
        return self.conditioning([""] * n)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B,tokens,width) of `conditioning`."""
        return self.conditioning(prompts)["encoder_hidden_states"]

    def _inputs(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning in the network's precision."""
        return {key: value.to(self.device, self.dtype) for key, value in conditioning.items()}

    # -- noise levels and pixels -----------------------------------------------------------------------------------

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The first state of a rollout from N(0,1): noise·√(1+σ₀²) in variance-exploding coordinates, itself in flow."""
        first = self.sigmas(steps)[0]
        return noise.to(self.device) * ((1 + first.square()).sqrt() if self.space == "ve" else 1.0)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise."""
        return add_noise(x0, noise, sigma, self.space)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32, of the scaled latents of images (B,3,H,W) in [0,1]."""
        with self._unparked(self.image_encoder()):
            posterior = self.vae.encode((images.to(self.device) * 2 - 1).to(self.vae.dtype)).latent_dist
        scale, shift = self._latent_scale()
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        if not torch.is_grad_enabled():
            pixels = self.image_size[0] * self.image_size[1]
            few = 1 if self.slices_decoder else max(1, 2**21 // pixels)  # eight of 512² are enough to keep a GPU busy
            return torch.cat([self._decode(part) for part in latents.split(few)])
        if not self.slices_decoder:
            return self._decode(latents)
        return torch.cat([checkpoint(self._decode, one, use_reentrant=False) for one in latents.split(1)])

    def _decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._latent_scale()
        pixels = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def latents_depend_on(self) -> str:
        """A name of everything that decides a picture's latents."""
        return f"{module_hash(self.vae)}/{self._latent_scale()}"

    def _latent_scale(self) -> tuple[float, float]:
        return float(self.vae.config.scaling_factor), float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    # -- memory and speed ------------------------------------------------------------------------------------------

    def park_encoders(self) -> None:
        """Text encoders and the autoencoder's encoder to the CPU, from where a prompt or image not met before fetches them."""
        self._parked = True
        self._move(self.encoders(), "cpu")

    def encoders(self) -> list[nn.Module]:
        """What training does not need once prompts and images are encoded."""
        return [*self.text_encoders(), *self.image_encoder()]

    def to(self, device: str | torch.device) -> None:
        """The network and the autoencoder to a device, and the text encoders unless they are parked."""
        self.device = torch.device(device)
        self._move([self.network, self.vae, *([] if self._parked else self.text_encoders())], self.device)
        if self._parked:
            self._move(self.image_encoder(), "cpu")

    @contextmanager
    def _unparked(self, modules: list[nn.Module]) -> Generator[None]:
        """Inside, modules that may be parked are on the device."""
        if not self._parked:
            yield
            return
        self._move(modules, self.device)
        try:
            yield
        finally:
            self._move(modules, "cpu")

    @staticmethod
    def _move(modules: list[nn.Module], device: str | torch.device) -> None:
        for module in modules:
            module.to(device)

    def text_encoders(self) -> list[nn.Module]:
        """What reads prompts."""
        return [m for m in self.pipeline.components.values() if isinstance(m, nn.Module) and m is not self.network and m is not self.vae]

    def image_encoder(self) -> list[nn.Module]:
        """The part of the autoencoder that reads images."""
        return [m for m in (self.vae.encoder, getattr(self.vae, "quant_conv", None)) if m is not None]

    def shard(self, mesh: Any) -> None:
        """Keep this process's part of the network's frozen weights (FSDP2): a block's are whole while it runs, forwards or back.

        Adapters stay whole, and so do text encoders and autoencoder. Every process of `mesh` must call the network equally often.
        """
        from torch.distributed.fsdp import fully_shard

        self.merges = False  # which needs whole weights
        kinds = set(self.network._no_split_modules)
        found = [module for module in self.network.modules() if type(module).__name__ in kinds]
        inner = [m for m in found if not any(part in found for part in m.modules() if part is not m)]
        whole = {p for name, p in self.network.named_parameters() if ".lora_" in name}
        for module in (*inner, self.network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)

    def use_channels_last(self) -> None:
        """Convolutions of the network and the autoencoder with channels as the fastest dimension, which tensor cores want."""
        for module in (self.network, self.vae):
            module.to(memory_format=torch.channels_last)

    def compile(self, **options: Any) -> None:
        """torch.compile every repeated block of the network, with its `options`; names of modules and parameters stay as they are.

        Blocks and not the whole: what is compiled once serves all blocks of a kind, and recomputation goes block by block.
        """
        limits: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
        # every width, adapter state and gradient mode is a program of its own, and all blocks count as one function
        name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.6
        setattr(limits, name, max(getattr(limits, name), 128))
        for module in self.network.modules():
            if type(module).__name__ in self.repeated:
                module.compile(**options)

    def checkpoint_gradients(self, *, denoiser: bool, decoder: bool) -> None:
        """Trade time for memory: recompute activations block by block in the backward pass."""
        (self.network.enable_gradient_checkpointing if denoiser else self.network.disable_gradient_checkpointing)()
        self.network.train(denoiser)  # diffusers checkpoints in training mode only; without dropout the mode changes nothing else
        _recompute(self.vae.decoder, decoder)


def _recompute(decoder: nn.Module, wanted: bool) -> None:
    """Recompute each part of an autoencoder's decoder by itself: diffusers would recompute whole blocks, the last of which has three
    residual blocks in full resolution that would be alive together."""
    for module in decoder.modules():
        if type(module).__name__ in ("ResnetBlock2D", "Attention", "Upsample2D"):
            module.__dict__.pop("forward", None)
            if wanted:
                module.forward = partial(_again, module.forward)


def _again(forward: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """A forward whose inside is computed again when its gradient is asked for."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **more)
    return checkpoint(forward, *arguments, use_reentrant=False, **more)
