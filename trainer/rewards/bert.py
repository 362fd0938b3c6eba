"""BERT's encoder with cross-attention to image tokens in every layer: the text side of BLIP (Li et al. 2022, arXiv:2201.12086)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-12  # BERT's LayerNorm


class _Heads(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context, width)
        self.value = nn.Linear(context, width)


class _Output(nn.Module):
    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(wide, width)
        self.LayerNorm = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = _Heads(width, context)
        self.output = _Output(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        split = (self.heads, -1)
        q, k, v = (
            layer(tokens).unflatten(-1, split).transpose(1, 2)  # (B,heads,L,·)
            for layer, tokens in ((self.self.query, x), (self.self.key, context), (self.self.value, context))
        )
        return self.output(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2), x)


class _Intermediate(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, wide)


class Layer(nn.Module):
    """A post-norm layer: self-attention, cross-attention to image tokens, MLP."""

    def __init__(self, width: int, heads: int, wide: int, context: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, width)
        self.crossattention = _Attention(width, heads, context)
        self.intermediate = _Intermediate(width, wide)
        self.output = _Output(wide, width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """x (B,L,width), mask (B,1,1,L) True at tokens to attend to, image (B,N,context) -> (B,L,width)."""
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image, None)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class _Embeddings(nn.Module):
    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, EPS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])


class _Encoder(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Bert(nn.Module):
    """A BERT encoder that cross-attends to image tokens; without token types, as in BLIP."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, wide: int, context: int, positions: int = 512) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocabulary, positions, width)
        self.encoder = _Encoder([Layer(width, heads, wide, context) for _ in range(depth)])

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ids (B,L) int64, mask (B,L) bool, image tokens (B,N,context) -> (B,L,width)."""
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x, mask[:, None, None, :], image)
        return x
