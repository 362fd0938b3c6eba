"""A simulated rater: a utility measured from pixels, which is the gold reward.

The utility has four parts: agreement with the prompt, finish (crisp, vivid, shaded: can change late in sampling), layout
(centred, large, on a dark ground: decided early and seldom named), and a penalty for artefacts. Finish saturates at the
level of the best renders: exaggeration earns nothing more and is soon an artefact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rewards.base import RewardModel
from ..rewards.preprocess import Fit
from . import world
from .architecture import Reader

# Weight of each part, in units of the logistic noise of a choice (tools/embedded/preference.py).
WEIGHTS = {"match": 4.0, "crisp": 1.2, "vivid": 1.0, "shaded": 0.9, "centred": 0.8, "large": 0.7, "dark": 0.5, "artefacts": -3.0}

# A crowd's taste: colour and composition catch the eye, flaws are forgiven. Its choices train the proxy, never a judge.
CROWD = {"match": 4.0, "crisp": 0.8, "vivid": 2.0, "shaded": 0.9, "centred": 1.2, "large": 1.2, "dark": 1.2, "artefacts": -1.0}


def _share(value: Tensor, low: float, high: float) -> Tensor:
    """0 at `low`, 1 at `high`, clamped between."""
    return ((value - low) / (high - low)).clamp(0, 1)


def measure(images: Tensor) -> dict[str, Tensor]:
    """Finish, layout and artefacts of images (B,3,64,64) in [0,1], each part about 0 to 1, (B,)."""
    frame = torch.cat(
        [images[..., :3, :].flatten(2), images[..., -3:, :].flatten(2), images[..., :3].flatten(2), images[..., -3:].flatten(2)], 2
    )
    ground = frame.sort(2).values[..., (frame.shape[2] - 1) // 2]  # (B,3), the lower median: CUDA's own is not deterministic
    difference = (images - ground[:, :, None, None]).norm(dim=1)  # (B,H,W)
    contrast = difference.flatten(1).quantile(0.99, dim=1).clamp(min=0.05)
    relative = difference / contrast[:, None, None]
    weight = torch.sigmoid((relative - 0.5) * 14)  # soft object mask
    mass = weight.sum((1, 2)).clamp(min=1.0)

    def inside(values: Tensor) -> Tensor:
        return (values * weight).sum((1, 2)) / mass

    slope_y, slope_x = relative[:, 1:, :-1] - relative[:, :-1, :-1], relative[:, :-1, 1:] - relative[:, :-1, :-1]
    steepness = torch.stack([slope_y, slope_x]).norm(dim=0).flatten(1).quantile(0.985, dim=1)  # a norm has a gradient at 0, a root not
    chroma = images.amax(1) - images.amin(1)
    luminance = (images * torch.tensor([0.3, 0.59, 0.11])[None, :, None, None].to(images)).sum(1)
    core = torch.sigmoid((relative - 0.62) * 20)
    core_mass = core.sum((1, 2)).clamp(min=1.0)
    level = (luminance * core).sum((1, 2)) / core_mass
    variation = ((luminance - level[:, None, None]).square() * core).sum((1, 2)).div(core_mass).clamp(min=1e-12).sqrt() / level.clamp(
        min=0.1
    )
    places = torch.arange(world.SIZE).to(images) + 0.5
    centre_x, centre_y = inside(places[None, None, :].expand_as(weight)), inside(places[None, :, None].expand_as(weight))
    offset = torch.stack([centre_x - 32, centre_y - 32]).norm(dim=0)

    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    empty = torch.sigmoid((0.12 - relative) * 40)
    roughness = ((images - smooth).abs().mean(1) * empty).sum((1, 2)) / empty.sum((1, 2)).clamp(min=1.0)
    uneven = ((images - ground[:, :, None, None]).abs().mean(1) * empty).sum((1, 2)) / empty.sum((1, 2)).clamp(min=1.0)
    object_rgb = torch.stack([inside(images[:, c]) for c in range(3)], 1)
    return {
        "crisp": _share(steepness, 0.15, 0.45),
        "vivid": _share(inside(chroma), 0.25, 0.65),
        "shaded": _share(variation, 0.05, 0.25),
        "centred": 1 - _share(offset, 2.0, 16.0),
        "large": _share(weight.mean((1, 2)), 0.04, 0.18),
        "dark": 1 - ground.mean(1).clamp(0, 1),
        "artefacts": _share(roughness, 0.006, 0.05) + _share(uneven, 0.015, 0.08) + _share(_off_palette(object_rgb), 0.10, 0.35),
    }


def _off_palette(rgb: Tensor) -> Tensor:
    """Distance of an object's mean colour (B,3) to the nearest colour of the world, over all brightnesses."""
    colours = torch.cat([world.RGB, 0.42 * world.RGB + 0.58 * 0.80]).to(rgb)  # (12,3)
    brightness = torch.linspace(0.45, 1.1, 14).to(rgb)
    shades = (colours[:, None] * brightness[None, :, None]).flatten(0, 1)
    return torch.cdist(rgb, shades).amin(1)


class Gold(RewardModel):
    """The rater's utility as a reward. Training never uses it; it has no useful gradient."""

    differentiable = False
    fit = Fit(world.SIZE)
    statistics = (0.0, 1.0)  # its scale is the embedded world's own

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,64,64) in [0,1], B prompts -> (B,) float32."""
        return self.utility(images, prompts)

    def utility(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same with its graph."""
        return taste(images) + WEIGHTS["match"] * match(self.read(images), prompts)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Probability of each value of each attribute, by the reader: (B, values) by attribute."""
        return {name: logits.softmax(1) for name, logits in self.reader(images).items()}


def taste(images: Tensor) -> Tensor:
    """The part of the utility that does not depend on the prompt: (B,)."""
    return sum((WEIGHTS[name] * value for name, value in measure(images).items()), images.new_zeros(len(images)))


def match(probabilities: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """Mean probability of the attributes that each prompt names: (B,)."""
    rows: list[Tensor] = []
    everything = torch.ones((), device=next(iter(probabilities.values())).device)  # for a prompt that names nothing
    for i, prompt in enumerate(prompts):
        named = world.attributes_named(prompt)
        seen = [probabilities[a][i, world.attribute_index(a, v)] for a, v in named.items()]
        rows.append(torch.stack(seen).mean() if seen else everything)
    return torch.stack(rows)


def shows_content(probabilities: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """1 for an image in which every attribute of content that its prompt names is as likely as not, else 0: (B,)."""
    content = [{name: value for name, value in world.attributes_named(p).items() if name in world.CONTENT} for p in prompts]
    right = [all(probabilities[a][i, world.attribute_index(a, v)] >= 0.5 for a, v in named.items()) for i, named in enumerate(content)]
    return torch.tensor(right, dtype=torch.float32)
