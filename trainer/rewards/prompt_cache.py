"""Rewards with separate image and text towers: each distinct prompt is encoded once, so the text tower can wait on the CPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..runtime.progress import progress_bar
from ..text import CutReport
from .base import RewardModel
from .clip import Tokenizer
from .preprocess import Fit

Encoding = TypeVar("Encoding")


class PromptCachedReward(RewardModel, Generic[Encoding]):
    """An image tower, a text tower, and a cache of encoded prompts.

    The text tower may lie on the CPU while the image tower is on an accelerator (see `place`): a prompt that is not in the cache
    brings it to the image tower's device and back.
    """

    prompts_kept: int
    """Encoded prompts that stay in memory; older ones are dropped."""

    def __init__(self, clip: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], fit: Fit) -> None:
        """`clip` is an open_clip.CustomTextCLIP, which is frozen."""
        super().__init__()
        clip.requires_grad_(False).eval()
        self.visual: Any = clip.visual
        self.text: Any = clip.text
        self.supports_gradient_checkpointing = hasattr(
            clip.visual, "transformer"
        )  # open_clip's residual networks take the call and do nothing
        self.tokenize, self.fit = tokenize, fit
        self._encoded: dict[str, Encoding] = {}
        self._report_cut = CutReport("the reward's text tower")

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Encoding:
        """Encode one prompt with the text tower, on the image tower's device."""

    def cut(self, prompt: str) -> int:
        """Tokens at the prompt's end that the text tower does not read; 0 where its tokenizer does not say."""
        return self.tokenize.cut(prompt) if isinstance(self.tokenize, Tokenizer) else 0

    @property
    def home(self) -> torch.device:
        """The image tower's device; not `device`, which ComfyUI sets on every model that it moves."""
        return self.visual.conv1.weight.device

    @property
    def text_tower(self) -> nn.Module:
        """Encodes prompts that are not in the cache."""
        return self.text

    def encoded(self, prompts: Sequence[str]) -> list[Encoding]:
        """One encoding per prompt, from the cache where possible."""
        self.remember(prompts)
        encoded = [self._encoded[p] for p in prompts]
        while len(self._encoded) > self.prompts_kept:
            del self._encoded[next(iter(self._encoded))]
        return encoded

    def forget(self) -> None:
        """Empty the cache of prompts."""
        self._encoded.clear()

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not in the cache."""
        missing = list(dict.fromkeys(p for p in prompts if p not in self._encoded))
        if not missing:
            return
        self._report_cut({prompt: self.cut(prompt) for prompt in missing})
        before = self.text.positional_embedding.device
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not meet a graph later
            try:
                self.text.to(self.home)
                for prompt in progress_bar(missing, "prompts of a reward"):  # one at a time: batched encoding rounds differently
                    self._encoded[prompt] = self.encode_prompt(prompt)
            finally:
                self.text.to(before)

    def place(self, device: str | torch.device, prompts: Sequence[str] | None = None) -> None:
        """Move to `device`; with `prompts`, encode them there and leave the text tower on the CPU.

        More prompts than the cache holds would bring the text tower back at every step: then it stays on the device.
        """
        if prompts is None or len(prompts) > self.prompts_kept:
            self.to(device)
            return
        for child in self.children():
            child.to("cpu" if child is self.text else device)
        self.remember(prompts)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.visual.set_grad_checkpointing(enabled)
