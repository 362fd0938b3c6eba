"""Text conditioning: each distinct prompt is encoded once, and kept in host memory or in a cache on disk."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..data.cache import TensorCache, key_of
from ..runtime.files import module_hash
from ..runtime.processes import ALONE, Processes
from ..runtime.progress import progress_bar
from ..text import CutReport
from .speed import on_device

Conditioning = dict[str, Tensor]
"""Text conditioning of B prompts: tensors (B,…) by argument name, `encoder_hidden_states` (B,tokens,width) among them.

Every prompt has the same shapes: encoders pad. With a `mask` (B,tokens) of its own tokens, which come first, a prompt is kept without
padding and padded again by zeros.
"""

# Entries of a text encoder's configuration that its output does not depend on; the weights are hashed with their precision
_IRRELEVANT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_BY_TOKEN = ("encoder_hidden_states", "mask")
EMBEDDINGS_KEPT = 2 << 30  # bytes of cached embeddings that are also kept in memory


def prompt_first(hidden: Tensor, mask: Tensor) -> Conditioning:
    """Hidden states (B,tokens,…) and their boolean mask (B,tokens), each prompt's own tokens first, in order."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    index = order.reshape(*order.shape, *[1] * (hidden.ndim - 2))
    return {"encoder_hidden_states": hidden.take_along_dim(index, 1), "mask": mask.gather(1, order)}


def _own_tokens(row: Conditioning) -> Conditioning:
    """One prompt's conditioning without what its mask hides."""
    mask = row.get("mask")
    if mask is None or mask.is_meta:
        return row
    own = int(mask.sum())
    return {key: value[:own].clone() if key in _BY_TOKEN else value for key, value in row.items()}


def _padded(row: Conditioning, tokens: int | None) -> Conditioning:
    """One prompt's conditioning with `tokens` tokens, where it has a mask; the added ones are zeros."""
    mask = row.get("mask")
    if mask is None or tokens is None or len(mask) >= tokens:
        return row
    missing = tokens - len(mask)
    longer = {key: torch.cat([row[key], row[key].new_zeros(missing, *row[key].shape[1:])]) for key in _BY_TOKEN}
    return {**row, **longer}


class Lengths:
    """Tokens of each prompt of a mask (B,tokens). Reading them waits for the GPU, so once for each mask."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __call__(self, mask: Tensor) -> list[int]:
        """On the meta device every prompt has all tokens."""
        if mask.is_meta:
            return [mask.shape[1]] * len(mask)
        if mask not in self._known:
            self._known[mask] = mask.sum(1).tolist()
        return self._known[mask]


class TextModel(Protocol):
    """A model with text encoders, as `Prompts` uses it."""

    pipeline: Any
    device: torch.device
    max_tokens: int | None

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Run the text encoders."""
        ...


class Prompts:
    """The text conditioning of a model, by prompt."""

    def __init__(self, model: TextModel, encoders: Sequence[nn.Module], offload: bool) -> None:
        self.model, self.encoders = model, encoders
        self.offload = offload
        """Whether the text encoders stay on the CPU except while they run."""
        self._report_cut = CutReport("the model")
        self._embeddings: dict[str, Conditioning] = {}
        self._cached: dict[str, tuple[TensorCache, str]] = {}  # cache and key of prompts that need not be in memory
        self._recent: deque[str] = deque()  # cached prompts that are in memory, oldest first

    def prepare(self, prompts: Sequence[str], cache: TensorCache | None = None, processes: Processes = ALONE) -> None:
        """Encode prompts that are not known yet; those in `cache` are read instead, and new ones are added to it.

        An embedding takes up to 4 MB (T5). Without a cache all stay in host memory, with one EMBEDDINGS_KEPT bytes of them do.
        """
        missing = sorted({p for p in prompts if p not in self._embeddings and p not in self._cached})
        if not missing:
            return
        self._report_cut({prompt: self.cut(prompt) for prompt in missing})
        if cache is None:
            self._embeddings.update(zip(missing, self._encode(missing)))
        else:
            keys = self._keys(missing)
            cache.fill(keys, lambda part: self._encode([missing[i] for i in part]), processes)
            self._cached.update({prompt: (cache, key) for prompt, key in zip(missing, keys)})

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of B prompts, on the CPU."""
        self.prepare(prompts)
        rows = [_padded(self._embedding(prompt), self.model.max_tokens) for prompt in prompts]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def trim(self) -> None:
        """Forget the embeddings in memory where they are more than EMBEDDINGS_KEPT bytes."""
        if sum(value.nbytes for embedding in self._embeddings.values() for value in embedding.values()) > EMBEDDINGS_KEPT:
            self.clear()

    def clear(self) -> None:
        """Forget the embeddings in memory."""
        self._embeddings.clear()
        self._recent.clear()

    def tokens(self, prompt: str) -> list[Any]:
        """What each tokenizer makes of a prompt, cut to what the encoders read."""
        return [t(prompt, max_length=limit, truncation=True, verbose=False).input_ids for t, limit in self._tokenizers()]

    def cut(self, prompt: str) -> int:
        """Tokens at a prompt's end that no text encoder reads."""
        if self.model.device.type == "meta":
            return 0
        return min((max(0, len(t(prompt, verbose=False).input_ids) - limit) for t, limit in self._tokenizers()), default=0)

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """Each tokenizer, and the tokens that its encoder reads."""
        parts: dict[str, Any] = self.model.pipeline.components
        found = [part for name, part in sorted(parts.items()) if "tokenizer" in name and part is not None]
        return [(t, min(t.model_max_length, self.model.max_tokens or t.model_max_length)) for t in found]

    def _embedding(self, prompt: str) -> Conditioning:
        if prompt not in self._embeddings:
            cache, key = self._cached[prompt]
            embedding = cache.read(key) or self._encode([prompt])[0]  # its file may have been removed since
            self._embeddings[prompt] = embedding
            self._recent.append(prompt)
            size = sum(value.nbytes for value in embedding.values())
            while len(self._recent) > max(1, EMBEDDINGS_KEPT // size):
                self._embeddings.pop(self._recent.popleft(), None)
        return self._embeddings[prompt]

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encoded one at a time: batched encoding rounds differently, which would break exact resume."""
        with on_device(self.encoders, self.model.device, self.offload):
            return [
                _own_tokens({key: value[0].cpu() for key, value in self.model.encode_prompts([prompt]).items()})
                for prompt in progress_bar(prompts, "encoding prompts")
            ]

    def _keys(self, prompts: Sequence[str]) -> list[str]:
        """Cache keys: text, tokens, the encoders' weights and configurations, the family and its token limit."""
        parts: dict[str, Any] = {name: part for name, part in sorted(self.model.pipeline.components.items()) if part is not None}
        encoders = {name: part for name, part in parts.items() if name.startswith("text_") and part in self.encoders}
        tokenizers = [part for name, part in parts.items() if "tokenizer" in name]
        settings = {
            name: part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config) for name, part in encoders.items()
        }
        configs = {name: {k: v for k, v in given.items() if k not in _IRRELEVANT} for name, given in settings.items()}
        model = [type(self.model).__name__, str(self.model.max_tokens), json.dumps(configs, sort_keys=True, default=str)]
        model += [f"{name} {module_hash(part)}" for name, part in encoders.items()]

        def tokens(prompt: str) -> str:
            return str([(t.pad_token_id, t.model_max_length, t(prompt, verbose=False).input_ids) for t in tokenizers])

        return [key_of("prompt", prompt, tokens(prompt), *model) for prompt in prompts]
