"""MPS: image tokens attend to the prompt's tokens that a condition selects (Zhang et al. 2024, arXiv:2405.14705)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..reward import check_lengths
from .clip import build_clip, temperature, tokenizer
from .preprocess import Fit, normalise
from .prompt_cache import PromptCachedReward
from .weights import CPU_FLOAT32, Placement, fill, strip

# The condition of the released "overall" head, from its evaluation code.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
SAFE = "model.safetensors of RE-N-Y/mpsv1"
DEPTH = 4  # layers of the cross model
_HEAD = 64  # channels per attention head, fixed in the original


class _Cross(nn.Module):
    """Multi-query cross-attention, image tokens attend to text tokens, and a parallel MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ff_in = nn.Linear(width, 8 * width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        """x (B,N,width), text (B,L,width), keep (B,L) bool -> (B,N,width)."""
        normed = self.norm(x)
        k, v = self.to_kv(text)[:, None].chunk(2, -1)  # (B,1,L,64), shared by all heads
        attended = _attend(_heads(self.to_q(normed)), k, v, keep[:, None, None, :])
        return x + self.to_out(attended) + self.ff_out(_swiglu(self.ff_in(normed)))


class _Parallel(nn.Module):
    """Multi-query self-attention with rotary positions and a parallel MLP, from one fused projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.split = (width, _HEAD, _HEAD, 8 * width)
        self.fused = nn.Linear(width, sum(self.split), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> (B,N,width)."""
        q, k, v, ff = self.fused(self.norm(x)).split(self.split, -1)
        attended = _attend(_rotate(_heads(q)), _rotate(k[:, None]), v[:, None], None)
        return x + self.attn_out(attended) + self.ff_out(_swiglu(ff))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, _HEAD)).transpose(1, 2)  # (B,L,width) -> (B,heads,L,64)


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return F.silu(gate) * value


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions over the two halves of a head (Su et al. 2021, arXiv:2104.09864, eq. 34), base 10000."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross = _Cross(width)
        self.parallel = _Parallel(width)

    def forward(self, x: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        return self.parallel(self.cross(x, text, keep))


class _CrossModel(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(width) for _ in range(depth)])


_NAMES = {
    ".0.fn.ff.0.": ".cross.ff_in.",
    ".0.fn.ff.2.": ".cross.ff_out.",
    ".0.fn.": ".cross.",
    ".1.fn.fused_attn_ff_proj.": ".parallel.fused.",
    ".1.fn.ff_out.1.": ".parallel.ff_out.",
    ".1.fn.": ".parallel.",
}


def _cross_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("cross_model.") and not key.endswith("inv_freq"):  # rotary frequencies are computed
            name = key.removeprefix("cross_model.")
            for theirs, ours in _NAMES.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed


@dataclass(frozen=True)
class _Prompt:
    """Text tokens (L,D), the pooled token (D,), and which tokens the condition selects (L,)."""

    tokens: Tensor
    pooled: Tensor
    keep: Tensor


class MPS(PromptCachedReward[_Prompt]):
    """The overall preference score exp(logit_scale)·cos(e, x_CLS).

    `threshold` selects the tokens: 0.3 in the authors' evaluation scripts, 0.01 in their model class and in ImageReFL's code.
    The mask is each prompt's own. The original takes the largest similarity of the whole batch, so that its scores depend on
    the other images of the batch.
    """

    prompts_kept = 512  # 160 MB at 77 × 1024 numbers each

    def __init__(
        self, clip: nn.Module, cross: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], fit: Fit, scale: float, threshold: float = 0.3
    ) -> None:
        super().__init__(clip, tokenize, fit)
        self.cross: Any = cross
        self.scale, self.threshold = scale, threshold
        self._recompute = False
        self._condition: Tensor | None = None

    @staticmethod
    def load(paths: Mapping[str, Path], architecture: Mapping[str, Any], placement: Placement = CPU_FLOAT32, threshold: float = 0.3) -> MPS:
        """From `weights`, a safetensors copy of the released weights; the released file is a pickled program and is refused."""
        path = paths["weights"]
        state = strip(placement.read(path, SAFE), "mps.")
        towers = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        clip = build_clip(towers, architecture, path, placement)
        cross = fill(lambda: _CrossModel(architecture["embed_dim"], DEPTH), _cross_state(state), path, placement)
        tokenize = tokenizer(architecture["text_cfg"]["context_length"], repair=False)
        return MPS(clip, cross, tokenize, Fit(architecture["vision_cfg"]["image_size"]), temperature(clip), threshold)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        check_lengths(images, prompts)
        encoded = self.encoded(prompts)
        tokens, pooled, keep = (torch.stack([getattr(p, name) for p in encoded]) for name in ("tokens", "pooled", "keep"))
        x = image_tokens(self.visual, normalise(self.fitted(images)))
        for layer in self.cross.layers:
            x = checkpoint(layer, x, tokens, keep, use_reentrant=False) if self._recompute else layer(x, tokens, keep)
        return self.scale * F.cosine_similarity(pooled.float(), x[:, 0].float(), dim=-1)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the image tower and the cross-attention in the backward pass."""
        super().gradient_checkpointing(enabled)
        self._recompute = enabled

    def encode_prompt(self, prompt: str) -> _Prompt:
        """Tokens of a prompt, and the similarity of each to the condition's tokens."""
        if self._condition is None:
            self._condition = self._tokens(CONDITION)[0]
        tokens, pooled = self._tokens(prompt)
        affinity = (tokens.float() @ self._condition.float().T).amax(-1)  # (L,): largest similarity to a token of the condition
        return _Prompt(tokens, pooled, affinity / affinity.amax() > self.threshold)

    def _tokens(self, text: str) -> tuple[Tensor, Tensor]:
        ids = self.tokenize([text]).to(self.home)
        end = self.text.vocab_size - 1
        ids = ids.masked_fill((ids == end).cumsum(1) > 0, end)  # padded with end tokens, as in training: every position counts here
        tokens, pooled = text_tokens(self.text, ids)
        return tokens[0], pooled[0]


def image_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """All tokens of an open_clip image tower before its last norm, projected: (B,3,S,S) -> (B,1+patches,D)."""
    x = visual.conv1(pixels.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    return _blocks(visual.transformer, visual.ln_pre(x), None) @ visual.proj


def text_tokens(text: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every token of an open_clip text tower, projected (B,L,D), and the one at the first end token (B,D)."""
    x = text.token_embedding(ids) + text.positional_embedding
    x = text.ln_final(_blocks(text.transformer, x, text.attn_mask)) @ text.text_projection
    return x, x[torch.arange(len(x), device=x.device), ids.argmax(-1)]


def _blocks(transformer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    if hasattr(transformer, "batch_first"):
        return transformer(x, attn_mask=mask)
    return transformer(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)  # open_clip before 2.26 has tokens first
