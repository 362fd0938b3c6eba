"""MPS: image tokens attend to the prompt's words that a list of qualities selects (Zhang et al. 2024, arXiv:2405.14705)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..memory.offload import Parking, slots
from ..reward import same_number
from ..runtime.progress import slow
from .clip import ARCHITECTURES, build_clip
from .preprocess import Fit, normalise
from .weights import FLOAT_ON_CPU, Held, fill, strip

# The condition of the released "overall" head, from its evaluation code.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
SAFE = "model.safetensors of RE-N-Y/mpsv1"
TEXTS_KEPT = 512  # words and mask of so many prompts stay in memory: 160 MB at 77 × 1024 numbers each
DEPTH = 4  # layers of the cross model
_HEAD = 64  # numbers per attention head, fixed in the original


class _Cross(nn.Module):
    """Image tokens ask, words answer: many heads of queries, one of keys and values, and an MLP beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ff_in = nn.Linear(width, 8 * width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, words: Tensor, keep: Tensor) -> Tensor:
        """x (B,N,width), words (B,L,width), keep (B,L) bool -> (B,N,width)."""
        normed = self.norm(x)
        k, v = self.to_kv(words)[:, None].chunk(2, -1)  # (B,1,L,64), the same for every head
        seen = _attend(_heads(self.to_q(normed)), k, v, keep[:, None, None, :])
        return x + self.to_out(seen) + self.ff_out(_swiglu(self.ff_in(normed)))


class _Parallel(nn.Module):
    """Self-attention with rotary positions and one head of keys and values, an MLP beside it, one projection for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = (width, _HEAD, _HEAD, 8 * width)
        self.fused = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> the same."""
        q, k, v, ff = self.fused(self.norm(x)).split(self.parts, -1)
        seen = _attend(_rotate(_heads(q)), _rotate(k[:, None]), v[:, None], None)
        return x + self.attn_out(seen) + self.ff_out(_swiglu(ff))


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

    def forward(self, x: Tensor, words: Tensor, keep: Tensor) -> Tensor:
        return self.parallel(self.cross(x, words, keep))


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
        if key.startswith("cross_model.") and not key.endswith("inv_freq"):  # the rates of the rotation are computed
            name = key.removeprefix("cross_model.")
            for theirs, ours in _NAMES.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed


@dataclass(frozen=True)
class _Text:
    """One prompt: words (L,D), its summary (D,), and which words the condition selects (L,)."""

    words: Tensor
    summary: Tensor
    keep: Tensor


class MPS:
    """The overall preference score exp(logit_scale)·cos(e, x_CLS) as a trainer.reward.Reward.

    `threshold` selects the words: 0.3 in the authors' evaluation scripts, 0.01 in their model class and in ImageReFL's code.
    The mask is each prompt's own; in the original the largest similarity of the whole batch decides, so that scores
    depend on batch mates.
    """

    differentiable = True
    reads_prompts = True
    texts_kept = TEXTS_KEPT

    def __init__(
        self, model: Any, cross: Any, tokenize: Callable[[Sequence[str]], Tensor], size: int = 224, threshold: float = 0.3
    ) -> None:
        self.model, self.cross, self.tokenize, self.threshold = model, cross, tokenize, threshold
        self.fit = Fit(size)
        self.recompute = False
        self.words = Parking(slots(self.model, without=("visual.", "logit_")))
        self._texts: dict[str, _Text] = {}
        self._condition: Tensor | None = None

    @staticmethod
    def load(
        path: Path,
        tokenize: Callable[[Sequence[str]], Tensor],
        architecture: Mapping[str, Any] = ARCHITECTURES["ViT-H-14"],
        held: Held = FLOAT_ON_CPU,
    ) -> MPS:
        """From a safetensors copy of the released weights; the released file itself is a pickled program and is refused."""
        state = strip(held.read(path, SAFE), "mps.")
        towers = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        model = build_clip(towers, architecture, path, held)
        cross = fill(lambda: _CrossModel(architecture["embed_dim"], DEPTH), _cross_state(state), path, held)
        return MPS(model, cross, tokenize, architecture["vision_cfg"]["image_size"])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        same_number(images, prompts)
        texts = self._read(prompts)
        words, summary, keep = (torch.stack([getattr(t, name) for t in texts]) for name in ("words", "summary", "keep"))
        x = image_tokens(self.model.visual, normalise(self.fit(images)))
        for layer in self.cross.layers:
            x = checkpoint(layer, x, words, keep, use_reentrant=False) if self.recompute else layer(x, words, keep)
        return self.model.logit_scale.float().exp() * F.cosine_similarity(summary.float(), x[:, 0].float(), dim=-1)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the activations of the image tower and the cross-attention in the backward pass."""
        self.recompute = enabled
        self.model.visual.set_grad_checkpointing(enabled)

    def _read(self, prompts: Sequence[str]) -> list[_Text]:
        self.remember(prompts)
        read = [self._texts[p] for p in prompts]
        while len(self._texts) > TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        return read

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts that were not met before: afterwards they need no text tower."""
        missing = list(dict.fromkeys(p for p in prompts if p not in self._texts))
        if not missing:
            return
        with torch.inference_mode(False), torch.no_grad(), self.words.here():
            if self._condition is None:
                self._condition = self._words([CONDITION])[0][0]
            for prompt in slow(missing, "prompts of a reward"):  # alone, as in TwoTower: so its rounding does not depend on others
                words, summaries = self._words([prompt])
                affinity = (words.float() @ self._condition.float().T).amax(-1)  # (1,L): how much each word is about a quality
                keep = affinity / affinity.amax(-1, keepdim=True) > self.threshold
                self._texts[prompt] = _Text(words[0], summaries[0], keep[0])

    def _words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenize(texts).to(self.model.logit_scale.device)
        end = self.model.vocab_size - 1
        ids = ids.masked_fill((ids == end).cumsum(1) > 0, end)  # padded with end tokens, as in training: every position counts here
        return text_tokens(self.model, ids)


def image_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """All tokens of an open_clip image tower before its last norm, projected: (B,3,S,S) -> (B,1+patches,D)."""
    x = visual.conv1(pixels.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    return _blocks(visual.transformer, visual.ln_pre(x), None) @ visual.proj


def text_tokens(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every token of an open_clip text tower, projected (B,L,D), and the one at the first end token (B,D)."""
    x = model.token_embedding(ids) + model.positional_embedding
    x = model.ln_final(_blocks(model.transformer, x, model.attn_mask)) @ model.text_projection
    return x, x[torch.arange(len(x), device=x.device), ids.argmax(-1)]


def _blocks(transformer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    if hasattr(transformer, "batch_first"):
        return transformer(x, attn_mask=mask)
    return transformer(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)  # open_clip before 2.26 has tokens first
