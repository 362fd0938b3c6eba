"""LPIPS, the perceptual distance of two images over AlexNet's features (Zhang et al. 2018, arXiv:1801.03924, eq. 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.weights import CPU_FLOAT32, Placement, fill, read_state

FILES = ("alexnet-owt-7be5be79.pth", "alex.pth")  # torchvision's network and the authors' weights/v0.1
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for pixels in [-1,1]; from the authors' code
_WIDTHS = (64, 192, 384, 256, 256)  # channels of AlexNet's five convolutions


class Lpips:
    """Σ over layers of the mean over positions of w·(â − b̂)², â and b̂ normalised along channels. 0 for equal images."""

    def __init__(self, network: nn.Module, weights: list[Tensor]) -> None:
        """`network`: AlexNet's convolutional layers; `weights`: one (1,C,1,1) per convolution."""
        self.network: Any = network
        self.weights = weights

    @staticmethod
    def load(network: Path, heads: Path, placement: Placement = CPU_FLOAT32) -> Lpips:
        """From torchvision's `alexnet-owt-7be5be79.pth` and the authors' `weights/v0.1/alex.pth`."""
        from torchvision.models import alexnet

        state = {k.removeprefix("features."): v for k, v in read_state(network).items() if k.startswith("features.")}
        head_state = read_state(heads)
        names = [f"lin{i}.model.1.weight" for i in range(5)]
        if [tuple(head_state[n].shape) if n in head_state else None for n in names] != [(1, w, 1, 1) for w in _WIDTHS]:
            raise ValueError(f"{heads} does not hold AlexNet's LPIPS heads: it needs {names[0]} … {names[-1]} of {list(_WIDTHS)} channels")
        layers = fill(lambda: alexnet(weights=None).features, state, network, placement)
        return Lpips(layers, [head_state[n].to(placement.device, torch.float32) for n in names])

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches (B,3,H,W) in [0,1], at least 63 pixels high and wide -> (B,)."""
        if a.shape != b.shape or min(a.shape[-2:]) < 63:
            raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: give equal shapes of at least 63 pixels")
        shift, scale = (torch.tensor(v).to(a)[:, None, None] for v in (_SHIFT, _SCALE))
        layers = zip(self._features((2 * a - 1 - shift) / scale), self._features((2 * b - 1 - shift) / scale), self.weights)
        return torch.stack([(w * (_unit(x) - _unit(y)).square()).sum(1).mean((1, 2)) for x, y, w in layers]).sum(0)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Activations after each rectifier."""
        features: list[Tensor] = []
        for layer in self.network:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                features.append(x)
        return features


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
