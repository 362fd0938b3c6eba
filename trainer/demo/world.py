"""The embedded world: scenes of one object, their captions, and how a scene becomes pixels.

A scene is eight categorical attributes plus continuous jitter. A caption names a random subset, so that one prompt
has many right images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rng import generator, seed_of

SIZE = 64  # pixels

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "ring", "cross"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "size": ("small", "large"),
    "position": ("left", "centre", "right"),
    "background": ("white", "grey", "black", "brown"),
    "edge": ("crisp", "blurred"),
    "tone": ("vivid", "pale"),
    "light": ("shaded", "flat"),
}
"""Every attribute with its values, in the order of the columns of a scene table."""

CONTENT = ("shape", "colour", "size", "position", "background")
"""The attributes that say what a scene shows: the ones that variety means."""

FINISH = ("edge", "tone", "light")
"""The attributes that say how a scene is rendered rather than what it shows."""

# Probability that a caption names an attribute: content mostly, layout sometimes, finish seldom. Position is never named: a UNet on
# 8×8 latents has no position embedding, and after 200 000 images it still put "on the left" anywhere.
_NAMED = {"shape": 0.9, "colour": 0.75, "size": 0.4, "position": 0.0, "background": 0.5, "edge": 0.25, "tone": 0.25, "light": 0.25}

RGB = torch.tensor([[0.90, 0.12, 0.12], [0.95, 0.85, 0.10], [0.12, 0.72, 0.20], [0.10, 0.80, 0.85], [0.15, 0.28, 0.92], [0.62, 0.16, 0.82]])
_BACKGROUND_RGB = torch.tensor([[0.94, 0.94, 0.94], [0.52, 0.52, 0.52], [0.07, 0.07, 0.07], [0.44, 0.29, 0.17]])
RADIUS = torch.tensor([[11.0, 13.0], [16.5, 19.5]])  # pixels, per size
TILT = math.pi / 12  # largest rotation of an object, radians
_CENTRE_X = torch.tensor([[17.0, 23.0], [29.0, 35.0], [41.0, 47.0]])  # pixels, per position
_CENTRE_Y = (22.0, 42.0)  # pixels, smallest and largest; never named


@dataclass(frozen=True)
class Caption:
    """A prompt; `named` maps an attribute to the value that the text states."""

    text: str
    named: dict[str, str]


def attribute_index(attribute: str, value: str) -> int:
    """Index of `value` in an attribute's column of a scene table."""
    return ATTRIBUTES[attribute].index(value)


def draw_scenes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` scenes: attributes (n,8) int64, each value equally likely, and jitter (n,8) uniform in [0,1)."""
    columns = [torch.randint(len(values), (n,), generator=generator) for values in ATTRIBUTES.values()]
    return torch.stack(columns, 1), torch.rand(n, 8, generator=generator)


def draw_caption(scene: list[int], rng: random.Random) -> Caption:
    """A caption that names a random subset, not empty, of a scene's attributes."""
    values = {name: ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, scene)}
    named = {name: value for name, value in values.items() if rng.random() < _NAMED[name]}
    if not named:
        named = {"shape": values["shape"]}
    return Caption(_phrase(named, rng), named)


def full_caption(scene: list[int], rng: random.Random) -> str:
    """A caption that names all eight attributes, the position included."""
    return _phrase({name: ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, scene)}, rng)


def completions(caption: Caption, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` scenes that a caption allows: named attributes are fixed, the rest are random."""
    attributes, jitter = draw_scenes(n, generator)
    for column, name in enumerate(ATTRIBUTES):
        if name in caption.named:
            attributes[:, column] = attribute_index(name, caption.named[name])
    return attributes, jitter


def _phrase(named: dict[str, str], rng: random.Random) -> str:
    finish = [named[name] for name in FINISH if name in named]
    rng.shuffle(finish)
    style = rng.choice(("front", "adjective", "tail")) if finish else "adjective"
    words = [named[name] for name in ("size", "colour") if name in named] + [named.get("shape", "shape")]
    if style == "adjective":
        words = finish + words
    text = "a " + " ".join(words)
    if "position" in named:
        text += " in the centre" if named["position"] == "centre" else f" on the {named['position']}"
    if "background" in named:
        text += rng.choice((f" on a {named['background']} background", f", {named['background']} background"))
    if style == "front":
        text = f"{', '.join(finish)}. {text}"
    if style == "tail":
        text += ", " + ", ".join(finish)
    return text


def attributes_named(prompt: str) -> dict[str, str]:
    """The attributes that a prompt states, read from its words."""
    words = set(prompt.lower().replace(",", " ").replace(".", " ").split())
    named: dict[str, str] = {}
    for name, values in ATTRIBUTES.items():
        said = words.intersection(values)
        if len(said) == 1:
            named[name] = said.pop()
    return named


def vocabulary() -> list[str]:
    """Every word of captions, sorted."""
    words = {word for values in ATTRIBUTES.values() for word in values}
    return sorted(words | {"a", "shape", "in", "the", "on", "background"})


def render(attributes: Tensor, jitter: Tensor) -> Tensor:
    """Anti-aliased images of scenes.

    attributes: (B,8) int64; jitter: (B,8) in [0,1): tilt, radius, x, y, light direction, brightness of object and
    background, hue. Returns (B,3,64,64) in [0,1].
    """
    shape, colour, size, position, background, edge, tone, light = attributes.unbind(1)
    rotation = TILT * (2 * jitter[:, 0] - 1)
    radius = _between(RADIUS[size], jitter[:, 1])
    centre_x = _between(_CENTRE_X[position], jitter[:, 2])
    centre_y = _CENTRE_Y[0] + (_CENTRE_Y[1] - _CENTRE_Y[0]) * jitter[:, 3]

    grid = torch.arange(SIZE) + 0.5
    dx = grid[None, None, :] - centre_x[:, None, None]  # (B,1,W)
    dy = grid[None, :, None] - centre_y[:, None, None]  # (B,H,1)
    cos, sin = rotation.cos()[:, None, None], rotation.sin()[:, None, None]
    u = (cos * dx + sin * dy) / radius[:, None, None]  # (B,H,W), object frame in radii
    v = (-sin * dx + cos * dy) / radius[:, None, None]

    distance = _signed_distance(u, v, shape) * radius[:, None, None]  # pixels, negative inside
    softness = torch.where(edge == 0, torch.ones_like(radius), 0.30 * radius + 1.0)[:, None, None]
    alpha = _smoothstep(0.5 - distance / (2 * softness))  # one pixel wide when crisp

    rgb = RGB[colour] + 0.06 * (jitter[:, 7:8] - 0.5) * torch.tensor([1.0, -1.0, 1.0])
    rgb = torch.where((tone == 0)[:, None], rgb, 0.42 * rgb + 0.58 * 0.80)
    rgb = rgb * (0.94 + 0.10 * jitter[:, 5:6])
    direction = 2 * math.pi * jitter[:, 4]
    towards = (dx * direction.cos()[:, None, None] + dy * direction.sin()[:, None, None]) / radius[:, None, None]
    shading = torch.where((light == 0)[:, None, None], 0.68 + 0.42 * towards.clamp(-1, 1), torch.ones_like(towards))
    thing = rgb[:, :, None, None] * shading[:, None]
    ground = _BACKGROUND_RGB[background] * (0.94 + 0.12 * jitter[:, 6:7])
    return (alpha[:, None] * thing + (1 - alpha[:, None]) * ground[:, :, None, None]).clamp(0, 1)


def captions(n: int, *purpose: int | str) -> list[Caption]:
    """`n` different captions of random scenes, a function of the purpose."""
    rng = random.Random(seed_of("captions", *purpose))
    found: dict[str, Caption] = {}
    while len(found) < n:
        caption = draw_caption([rng.randrange(len(values)) for values in ATTRIBUTES.values()], rng)
        found[caption.text] = caption
    return list(found.values())


def real_images(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """`n` renders (n,3,64,64) with a caption each: the demo's data set."""
    attributes, jitter = draw_scenes(n, generator(seed, "real images"))
    rng = random.Random(seed_of(seed, "real captions"))
    return render(attributes, jitter), [draw_caption(scene, rng).text for scene in attributes.tolist()]


def real_renders(prompts: Sequence[Caption], per_prompt: int, seed: int) -> Tensor:
    """Renders (P·n,3,64,64) of each prompt; attributes that it does not name are random."""
    parts = [render(*completions(caption, per_prompt, generator(seed, "renders", i))) for i, caption in enumerate(prompts)]
    return torch.cat(parts)


def _between(bounds: Tensor, fraction: Tensor) -> Tensor:
    return bounds[:, 0] + (bounds[:, 1] - bounds[:, 0]) * fraction


def _smoothstep(t: Tensor) -> Tensor:
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


def _signed_distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Distance to the outline in radii, negative inside, for the shape of each sample."""
    reach = (u.square() + v.square()).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    candidates = torch.stack(
        [
            reach - 0.92,
            box - 0.80,
            _polygon(u, v, 3) - 0.55,
            _star(u, v),
            (reach - 0.74).abs() - 0.24,
            torch.minimum(torch.maximum(u.abs() - 0.98, v.abs() - 0.33), torch.maximum(v.abs() - 0.98, u.abs() - 0.33)),
        ]
    )  # (shapes,B,H,W)
    return candidates.gather(0, shape[None, :, None, None].expand(1, *u.shape))[0]


def _polygon(u: Tensor, v: Tensor, sides: int) -> Tensor:
    angles = [2 * math.pi * k / sides for k in range(sides)]
    return torch.stack([u * math.cos(a) + v * math.sin(a) for a in angles]).amax(0)


def _star(u: Tensor, v: Tensor, points: int = 5, outer: float = 1.12, inner: float = 0.46) -> Tensor:
    """Distance to the nearer edge of a star, folded into one half of one point."""
    sector = math.pi / points
    angle = torch.atan2(v, u)
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    reach = (u.square() + v.square()).sqrt()
    x, y = reach * folded.cos(), reach * folded.sin()
    tip = (outer, 0.0)
    notch = (inner * math.cos(sector), inner * math.sin(sector))
    normal = (notch[1] - tip[1], tip[0] - notch[0])
    length = math.hypot(*normal)
    return ((x - tip[0]) * normal[0] + (y - tip[1]) * normal[1]) / length
