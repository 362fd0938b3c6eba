"""Natural-like images, and what becomes of them on the way to a tower: by matrices of Keys' kernel, and by Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit

SIZES = ((224, 224), (300, 300), (320, 200), (180, 333))  # square and not, larger and smaller than the towers' 224


def natural_images(sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[Tensor]:
    """Natural-like images (3,H,W) in [0,1]: noise whose amplitude falls with frequency, as photographs' does."""
    rng = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for height, width in sizes:
        rates = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt().clamp(min=1 / max(height, width))
        spectrum = torch.fft.rfft2(torch.randn(3, height, width, generator=rng)) / rates
        image = torch.fft.irfft2(spectrum, s=(height, width))
        image = image + image.mean(0, keepdim=True)  # the channels of a photograph agree
        made.append((0.5 + 0.22 * (image - image.mean()) / image.std()).clamp(0, 1))
    return made


def cubic_weights(length: int, target: int) -> Tensor:
    """Pillow's bicubic weights (target, length): Keys' kernel with a = −½, widened when shrinking, cut and renormalised at the edges."""
    scale = length / target
    centres = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale - 0.5
    x = (torch.arange(length, dtype=torch.float64) - centres).abs() / max(scale, 1.0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(1, keepdim=True)


def pixels(image: Tensor, size: int, pad: bool) -> Tensor:
    height, width = image.shape[-2:]
    if pad:
        scale = size / max(height, width)
        target = (round(height * scale), round(width * scale))
    else:
        shorter = min(height, width)
        target = (int(size * height / shorter), int(size * width / shorter))
    wide = (image.double() @ cubic_weights(width, target[1]).T).clip(0, 1)
    resized = (cubic_weights(height, target[0]) @ wide).clip(0, 1).float()
    if pad:
        top, left = ((size - side) // 2 for side in target)
        square = torch.zeros(3, size, size)
        square[:, top : top + target[0], left : left + target[1]] = resized
    else:
        top, left = (round((side - size) / 2) for side in target)
        square = resized[:, top : top + size, left : left + size]
    return (square - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def with_pillow(image: Tensor, fit: Fit) -> Tensor:
    """What `fit` makes of one image (3,H,W), by way of 8-bit images and Pillow, as the original packages do it."""
    import numpy as np
    from PIL import Image

    height, width = image.shape[-2:]
    side = min(height, width) if fit.rule == "crop" else max(height, width)
    whole = int if fit.rule == "crop" else round
    drawn = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    drawn = drawn.resize((whole(width * fit.size / side), whole(height * fit.size / side)), Image.Resampling.BICUBIC)
    if fit.rule == "crop":
        left, top = round((drawn.width - fit.size) / 2), round((drawn.height - fit.size) / 2)
        square = drawn.crop((left, top, left + fit.size, top + fit.size))
    else:
        square = Image.new("RGB", (fit.size, fit.size))
        square.paste(drawn, ((fit.size - drawn.width) // 2, (fit.size - drawn.height) // 2))
    return torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) / 255


def pillow_error(size: tuple[int, int], fit: Fit) -> tuple[float, float]:
    """Largest and mean |tensor − Pillow| of one natural-like image, in 255ths."""
    (image,) = natural_images([size], 1)
    image = (image * 255).round() / 255
    error = (fit(image[None])[0] - with_pillow(image, fit)).abs() * 255
    return float(error.max()), float(error.mean())


def pixel_batch(images: Sequence[Tensor], size: int, pad: bool = False) -> Tensor:
    return torch.stack([pixels(image, size, pad) for image in images])
