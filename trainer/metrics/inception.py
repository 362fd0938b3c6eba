"""The Inception network of the published FID (Heusel et al. 2017, arXiv:1706.08500), on torchvision's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rewards.files import WeightFile
from ..rewards.weights import CPU_FLOAT32, Placement, fill, read_state

INCEPTION = WeightFile(
    "mseitzer/pytorch-fid",
    "pt_inception-2015-12-05-6726825d.pth",
    "fid_weights",
    also=("weights-inception-2015-12-05-6726825d.pth",),  # the same file as torch-fidelity names it
    folder="inception",
    named_in="github.com/mseitzer/pytorch-fid: src/pytorch_fid/inception.py",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)
FEATURES, SIDE = 2048, 299


class Inception:
    """Pooled features of the network that FID is defined with: images -> (B,2048).

    It is TensorFlow's of 2015, ported by the authors of pytorch-fid: average pooling leaves the padding out, and the last block pools
    by the maximum. Images are rounded to 8 bits, as in the files that other programs read, and resized as pytorch-fid does, bilinear
    without antialiasing.
    """

    name = "inception"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @staticmethod
    def load(path: Path, placement: Placement = CPU_FLOAT32) -> Inception:
        """From `pt_inception-2015-12-05-6726825d.pth`; its classifier is not used."""
        state = {key: value for key, value in read_state(path).items() if not key.startswith(("fc.", "AuxLogits."))}
        for key in [key for key in state if key.endswith(".running_mean")]:  # files of PyTorch before 0.4.1 do not count batches
            state.setdefault(key.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
        return Inception(fill(_network, state, path, placement))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,2048) float32."""
        stored = (images.float().clamp(0, 1) * 255).round() / 255
        return self.model(2 * F.interpolate(stored, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1).float()


def _network() -> nn.Module:
    from torchvision.models import inception as blocks

    class Averaged:
        """A block whose pooled branch, the last one, is taken again without the padding."""

        branch_pool: Any

        def pooled(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

        def _forward(self, x: Tensor) -> list[Tensor]:
            branches = cast(Any, super())._forward(x)
            return [*branches[:-1], self.branch_pool(self.pooled(x))]

    class A(Averaged, blocks.InceptionA):
        pass

    class C(Averaged, blocks.InceptionC):
        pass

    class E(Averaged, blocks.InceptionE):
        pass

    class Maximum(E):
        def pooled(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, 3, 1, 1)

    network: Any = blocks.Inception3(num_classes=1, aux_logits=False, init_weights=False)
    network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    network.Mixed_6b, network.Mixed_6c, network.Mixed_6d, network.Mixed_6e = (C(768, width) for width in (128, 160, 160, 192))
    network.Mixed_7b, network.Mixed_7c, network.fc = E(1280), Maximum(2048), nn.Identity()
    return network
