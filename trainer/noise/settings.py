"""The methods of noise optimisation and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import of_method

FEW_STEPS = 8
"""Sampler steps up to which the published methods, for one- to four-step models, are used without a warning."""


@dataclass(frozen=True)
class NoiseOptimisation:
    """Settings of one method; the fields that a method has are in its row of METHODS."""

    iterations: int = field(default=50, metadata={"min": 1, "max": 10000, "help": "images drawn from each start, the first from its noise"})
    starts: int = field(default=1, metadata={"min": 1, "max": 1000, "help": "start noises, each optimised by itself"})
    learning_rate: float = field(default=5.0, metadata={"min": 0.0, "max": 1e6, "help": "of SGD with Nesterov momentum 0.9"})
    clip: float = field(default=0.1, metadata={"min": 0.0, "max": 1e6, "help": "largest norm of a gradient"})
    norm_weight: float = field(
        default=0.01, metadata={"min": 0.0, "max": 1e6, "help": "weight of −log p(‖z‖), which keeps the norm of the noise z as drawn"}
    )
    neighbours: int = field(default=4, metadata={"min": 1, "max": 1000, "help": "noises tried in each iteration"})
    rotation: float = field(default=0.3, metadata={"min": 0.0, "max": 1.0, "help": "share ν of new noise in the first neighbours"})
    rotation_end: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0, "help": "share ν of new noise in the last neighbours"})
    name: str = "reno"


@dataclass(frozen=True)
class Method:
    """One method: the fields that it has, with their defaults."""

    source: str
    help: str
    defaults: Mapping[str, Any]
    gradient: bool


_GRADIENT = {"iterations": 50, "learning_rate": 5.0, "clip": 0.1, "norm_weight": 0.01}
METHODS: dict[str, Method] = {
    "reno": Method("arXiv:2406.04312", "gradient of the weighted sum of rewards through all steps", {**_GRADIENT, "starts": 1}, True),
    "carinox": Method(
        "arXiv:2509.17458", "as reno, each reward's gradient clipped by itself, from several starts", {**_GRADIENT, "starts": 5}, True
    ),
    "rotate": Method(
        "",
        "without gradients: neighbours √(1−ν²)·z + ν·ξ of the best noise z, any reward, any number of steps",
        {"iterations": 12, "starts": 1, "neighbours": 4, "rotation": 0.3, "rotation_end": 0.1},
        False,
    ),
}
"""Every method by the name that `--optimise-noise` takes; the defaults of those with a source are the authors'."""
FIELDS = tuple(f.name for f in fields(NoiseOptimisation) if f.name != "name")
"""The settings, in the order of their flags."""


def optimisation_of(name: str, given: Mapping[str, Any]) -> NoiseOptimisation:
    """The settings of a method from those that are given; ConfigError for a field that it lacks, or a value out of range."""
    return of_method(NoiseOptimisation, METHODS, name, given, "noise optimisation")
