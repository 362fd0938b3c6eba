"""The methods of reward search and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..config import ConfigError, of_method

Potential = Literal["diff", "max", "add", "rt"]
Growth = Literal["all", "exponential", "linear"]
Shrink = Literal["exponential", "linear", "quadratic"]
WIDEST = 4096
"""The most particles or children."""


@dataclass(frozen=True)
class Search:
    """Settings of a search; the fields that a method has are in its row of METHODS."""

    particles: int = field(default=4, metadata={"min": 1, "max": WIDEST, "help": "particles that survive each selection"})
    children: int = field(default=1, metadata={"min": 1, "max": WIDEST, "help": "children of a particle in each round"})
    block: int = field(default=1, metadata={"min": 0, "max": 1000, "help": "sampler steps of a round; 0: a fifth of all steps"})
    start: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "share of the steps before the first selection"})
    end: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0, "help": "share of the steps after which none is selected"})
    temperature: float = field(
        default=0.0, metadata={"min": 0.0, "max": 1e6, "help": "draws the child by softmax(reward/temperature); 0 takes the best"}
    )
    potential: Potential = field(default="max", metadata={"help": "how a particle is weighted: by the change, maximum, sum or value"})
    strength: float = field(default=10.0, metadata={"min": 0.0, "max": 1e6, "help": "λ of the weights exp(λ·reward)"})
    ess: float = field(
        default=0.5,
        metadata={"min": 0.0, "max": 1.0, "help": "resamples when the effective sample size is below this share; 1: always, 0: never"},
    )
    lookahead: int = field(default=1, metadata={"min": 1, "max": 100, "help": "deterministic steps to the image that is scored"})
    oversample: int = field(default=5, metadata={"min": 1, "max": 100, "help": "particles at the start, as a multiple"})
    width: float = field(default=1.0, metadata={"min": 0.0, "max": 100.0, "help": "children of a wide round, as a multiple"})
    growth: Growth = field(default="exponential", metadata={"help": "how the share of wide rounds grows over the steps"})
    shrink: Shrink = field(default="exponential", metadata={"help": "how the number of particles shrinks over the steps"})
    replaced: float = field(
        default=0.0, metadata={"min": 0.0, "max": 0.9, "help": "share of the particles, the worst, that others replace"}
    )
    name: str = "best-of-n"


@dataclass(frozen=True)
class Method:
    """One method: the fields it has with their defaults, and what a budget adds to."""

    source: str
    help: str
    defaults: Mapping[str, Any]
    grows: Literal["particles", "children"]
    final: Literal["all", "parent", "best"] = "best"
    """Which candidates of the last round may be returned: all, the best of each parent, or the best `particles`."""


METHODS: dict[str, Method] = {
    "best-of-n": Method("", "draw all particles, keep the best", {"particles": 4}, "particles", "all"),
    "svdd": Method(
        "arXiv:2408.08252",
        "at each step keep the best child of each particle",
        {"particles": 1, "children": 4, "start": 0.0, "end": 1.0, "temperature": 0.0, "lookahead": 1},
        "children",
        "parent",
    ),
    "code": Method(
        "arXiv:2502.00968",
        "after each block of steps keep the best child of each particle",
        {"particles": 1, "children": 4, "block": 5, "lookahead": 1},
        "children",
        "parent",
    ),
    "fk": Method(
        "arXiv:2501.06848",
        "resample the particles by Feynman-Kac weights, so that they follow p(x)·exp(λ·reward)",
        {"particles": 4, "block": 0, "start": 0.2, "end": 0.8, "potential": "max", "strength": 10.0, "ess": 0.5, "lookahead": 1},
        "particles",
        "all",
    ),
    "dlbs": Method(
        "arXiv:2501.19252",
        "beam search: at each step keep the best of all children, scored after a lookahead",
        {"particles": 2, "children": 2, "start": 0.0, "end": 1.0, "lookahead": 1},
        "children",
    ),
    "dsearch": Method(
        "arXiv:2503.02039",
        "many particles early, many children late: the beam shrinks while rounds widen",
        {
            **{"particles": 1, "children": 2, "oversample": 5, "width": 1.0, "growth": "exponential", "shrink": "exponential"},
            **{"replaced": 0.0, "lookahead": 1},
        },
        "children",
        "parent",
    ),
}
"""Every method by the name that `--search` takes. Official defaults are in docs/sampling.md."""


def search_of(name: str, given: Mapping[str, Any]) -> Search:
    """The settings of a method from those that are given; ConfigError for a field that it lacks, or a value out of range."""
    found = of_method(Search, METHODS, name, given, "search")
    if found.end < found.start:
        raise ConfigError(f"{name}: end {found.end:g} lies before start {found.start:g}: give 0 ≤ start ≤ end ≤ 1")
    return found


def widened(search: Search, by: int) -> Search:
    """The search with as many particles or children, whichever its method grows by a budget."""
    return replace(search, **{METHODS[search.name].grows: by})


FIELDS = tuple(f.name for f in fields(Search) if f.name != "name")
"""The settings, in the order of their flags."""
