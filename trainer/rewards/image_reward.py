"""ImageReward: BLIP's BERT encoder cross-attends to image tokens, a linear head scores it (Xu et al. 2023, arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reward import check_lengths
from ..text import CutReport
from .base import RewardModel
from .bert import Bert
from .linear_head import LinearHead
from .preprocess import Fit, normalise
from .vit import vision_transformer, vit_tokens
from .weights import CPU_FLOAT32, Placement, fill, strip

TOKENS = 35  # the length that the reward was trained with; longer prompts are cut

ARCHITECTURE: dict[str, dict[str, int]] = {
    "image": {"size": 224, "patch": 16, "width": 1024, "depth": 24, "heads": 16},
    "text": {"vocabulary": 30524, "width": 768, "depth": 12, "heads": 12, "wide": 3072},
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # BLIP's contrastive heads


class _Blip(nn.Module):
    def __init__(self, image: Mapping[str, int], text: Mapping[str, int]) -> None:
        super().__init__()
        self.visual_encoder = vision_transformer(**image)
        self.text_encoder = Bert(**text, context=image["width"])


class _Model(nn.Module):
    def __init__(self, image: Mapping[str, int], text: Mapping[str, int]) -> None:
        super().__init__()
        self.blip = _Blip(image, text)
        self.mlp = LinearHead(text["width"])


class ImageReward(RewardModel):
    """Raw scores, mean 0.167 and standard deviation 1.033 on the authors' data.

    `tokenize` gives ids (N,L) and a mask (N,L), True at tokens to attend to. The text encoder depends on the image.
    """

    supports_gradient_checkpointing = True
    statistics = (0.16717362830052426, 1.0333394966054072)  # in the authors' code

    def __init__(self, model: nn.Module, tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]], fit: Fit) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenize, self.fit = tokenize, fit

    @staticmethod
    def load(paths: Mapping[str, Path], architecture: Mapping[str, Any] = ARCHITECTURE, placement: Placement = CPU_FLOAT32) -> ImageReward:
        """From `weights`, the released file or a safetensors copy, and `vocabulary`, bert-base-uncased's `vocab.txt`."""
        path = paths["weights"]
        state = {k: v for k, v in strip(placement.read(path), "model.").items() if not k.startswith(_UNUSED)}
        model = fill(lambda: _Model(architecture["image"], architecture["text"]), state, path, placement)
        tokenize = _stub_tokens if placement.is_meta else word_pieces(paths["vocabulary"])
        return ImageReward(model, tokenize, Fit(architecture["image"]["size"]))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        check_lengths(images, prompts)
        tokens = vit_tokens(self.model.blip.visual_encoder, normalise(self.fitted(images)))
        ids, mask = (t.to(tokens.device) for t in self.tokenize(prompts))
        return self.model.mlp(self.model.blip.text_encoder(ids, mask, tokens)[:, 0])

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.model.blip.visual_encoder.set_grad_checkpointing(enabled)


def _stub_tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(texts), TOKENS, dtype=torch.long), torch.ones(len(texts), TOKENS, dtype=torch.bool)


def word_pieces(vocabulary: Path) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """BERT's lower-casing tokenizer from a `vocab.txt`: texts -> ids (N,35) and mask (N,35)."""
    from tokenizers import BertWordPieceTokenizer

    if not vocabulary.is_file():
        raise FileNotFoundError(f"no vocabulary {vocabulary}: ImageReward needs bert-base-uncased's vocab.txt")
    listed = vocabulary.read_text("utf-8", errors="replace").splitlines()
    if listed[:1] != ["[PAD]"] or not {"[UNK]", "[CLS]", "[SEP]"} <= set(listed):
        raise ValueError(f"{vocabulary} is not bert-base-uncased's vocabulary: it must start with [PAD] and hold [UNK], [CLS] and [SEP]")
    tokenizer: Any = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)

    report_cut = CutReport("ImageReward")

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer.encode_batch(list(texts))
        report_cut({text: sum(sum(rest.attention_mask) - 2 for rest in e.overflowing) for text, e in zip(texts, encoded, strict=True)})
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)

    return tokenize
