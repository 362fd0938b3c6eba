"""The head that ImageReward, LAION's aesthetic predictor and HP share."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Five linear layers without activations. Their indices are those of the released files, which have dropout layers between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.ModuleDict({str(i): nn.Linear(*size) for i, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        """(B,width) -> (B,) float32."""
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0].float()
