"""ImageReward: BLIP reads the prompt in the light of the image, and a linear head scores it (Xu et al. 2023, arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reward import same_number
from .bert import Bert
from .linear_head import LinearHead
from .preprocess import Fit, normalise
from .vit import ViT
from .weights import FLOAT_ON_CPU, Held, fill, strip

TOKENS = 35  # the length that the reward was trained with; longer prompts are cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the released weights, from its own code: its scores are about N(0,1) after it

ARCHITECTURE: dict[str, dict[str, int]] = {
    "image": {"size": 224, "patch": 16, "width": 1024, "depth": 24, "heads": 16},
    "text": {"vocabulary": 30524, "width": 768, "depth": 12, "heads": 12, "wide": 3072},
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # BLIP's contrastive heads, in the file and not in the score


class _Blip(nn.Module):
    def __init__(self, image: Mapping[str, int], text: Mapping[str, int]) -> None:
        super().__init__()
        self.visual_encoder = ViT(**image)
        self.text_encoder = Bert(**text, context=image["width"])


class _Model(nn.Module):
    def __init__(self, image: Mapping[str, int], text: Mapping[str, int]) -> None:
        super().__init__()
        self.blip = _Blip(image, text)
        self.mlp = LinearHead(text["width"])


class ImageReward:
    """ImageReward as a trainer.reward.Reward; raw scores, mean 0.167 and standard deviation 1.033 on its authors' data.

    `tokenize` gives ids (N,L) and a mask (N,L), True where words are. The image is read once per call; the text side depends on it.
    """

    differentiable = True

    def __init__(self, model: nn.Module, tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]], size: int = 224) -> None:
        self.model: Any = model
        self.tokenize = tokenize
        self.fit = Fit(size)

    @staticmethod
    def load(
        path: Path, vocabulary: Path, architecture: Mapping[str, Mapping[str, int]] = ARCHITECTURE, held: Held = FLOAT_ON_CPU
    ) -> ImageReward:
        """From the released file, or a safetensors copy, and bert-base-uncased's `vocab.txt`."""
        state = {k: v for k, v in strip(held.read(path), "model.").items() if not k.startswith(_UNUSED)}
        model = fill(lambda: _Model(architecture["image"], architecture["text"]), state, path, held)
        return ImageReward(model, word_pieces(vocabulary) if held.valued else _no_words, architecture["image"]["size"])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,) raw scores."""
        same_number(images, prompts)
        tokens = self.model.blip.visual_encoder(normalise(self.fit(images)))
        ids, mask = (t.to(tokens.device) for t in self.tokenize(prompts))
        words = self.model.blip.text_encoder(ids, mask, tokens)
        return self.model.mlp(words[:, 0])

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.model.blip.visual_encoder.recompute = enabled


def _no_words(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(texts), TOKENS, dtype=torch.long), torch.ones(len(texts), TOKENS, dtype=torch.bool)


def word_pieces(vocabulary: Path) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """BERT's lower-casing tokenizer from a `vocab.txt`: texts -> ids (N,35) and mask (N,35)."""
    from tokenizers import BertWordPieceTokenizer

    if not vocabulary.is_file():
        raise FileNotFoundError(f"no vocabulary {vocabulary}: ImageReward needs bert-base-uncased's vocab.txt")
    listed = vocabulary.read_text("utf-8", errors="replace").splitlines()
    if listed[:1] != ["[PAD]"] or not {"[UNK]", "[CLS]", "[SEP]"} <= set(listed):
        raise ValueError(f"{vocabulary} is not bert-base-uncased's vocabulary: [PAD] is not its first word, or a mark is missing")
    words: Any = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    words.enable_truncation(TOKENS)
    words.enable_padding(length=TOKENS)

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = words.encode_batch(list(texts))
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)

    return tokenize
