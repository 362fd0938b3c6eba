"""TFLOP of what a search spends at SD1.5's shapes, on the meta device: python tests/large/arithmetic.py

Exits with 1 where `trainer.demo.sampling_study.TFLOP` differs by more than 0.1 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from trainer.demo.sampling_study import TFLOP


def tflop(call: Callable[[], object]) -> float:
    """A call's arithmetic; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e12


def counted() -> dict[str, float]:
    """The default UNet of diffusers is SD1.5's but for its text width and heads."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
        tower = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
        return {
            "model": 2 * tflop(lambda: unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))),
            "decodes": tflop(lambda: vae.decode(torch.empty(1, 4, 64, 64))),
            "rewards": tflop(lambda: tower.encode_image(torch.empty(1, 3, 224, 224))),
        }


if __name__ == "__main__":
    found = counted()
    print({name: round(value, 4) for name, value in found.items()})
    sys.exit(any(abs(found[name] / value - 1) > 1e-3 for name, value in TFLOP.items()))
