"""The guides: what is known as two-model guidance, each a table of coefficients over a base and a tuned model.

A guide is a dataclass of its settings; its fields are the flags of `sample` and the widgets of the Two-Model Guider.
Coefficients sum to 1, so that a mix is the same on ε, v and x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from .guidance import MARGIN, Mix, Slot, Switch, combined
from .guide_table import parse_table, row_at

Read = Literal["guidance_scale", "tuned_guidance_scale", "negative", "tuned_negative", "proxy"]
"""What a mix may depend on beside prompts: the guidance scales s and s' of base and tuned model, their negatives, and a proxy prompt."""


class Guide(Protocol):
    """Settings of one guide."""

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """The mix of two models for a run over levels (T+1,). `base.guidance_scale` is the scale s of every guide.

        Raises ValueError for settings that fit no run, or not this one.
        """
        ...

    def reads(self, s: float, t: float) -> set[Read]:
        """What the mix depends on where the guidance scales of base and tuned model are s and t; the rest changes no image."""
        ...


def _weight(default: float, what: str) -> float:
    return field(default=default, metadata={"min": -100.0, "max": 100.0, "help": what})


def _start() -> float:
    return field(
        default=0.0,
        metadata={"min": 0.0, "max": 1.0, "help": "share of the steps from which weight counts; before it the tuned model alone"},
    )


def _end() -> float:
    return field(
        default=1.0,
        metadata={"min": 0.0, "max": 1.0, "help": "share of the steps up to which weight counts; after it the tuned model alone"},
    )


def _read(*scales: Read, base: bool = False, tuned: bool = False, proxy: bool = False) -> set[Read]:
    """The scales, the negatives of base and tuned model, and the proxy prompt."""
    rest: dict[Read, bool] = {"negative": base, "tuned_negative": tuned, "proxy": proxy}
    return {*scales, *(name for name, is_read in rest.items() if is_read)}


def _within(base: Slot, tuned: Slot, weight: float, start: float, end: float, steps: int) -> Mix:
    """base + weight·(tuned − base) from `start` to `end`, tuned elsewhere."""
    first, last = round(start * steps), round(end * steps)
    if first >= last:
        raise ValueError(f"no step of the {steps} lies from start {start:g} to end {end:g}: give a wider range")
    return Mix((base, tuned), lambda i, sigma: (1 - weight, weight) if first <= i < last else (0.0, 1.0))


@dataclass(frozen=True)
class Combined:
    """Combined generation (ImageReFL, arXiv:2505.22569, section 4): the base down to a noise level, the tuned model from there on."""

    switch: str = field(default="75%", metadata={"help": "first step of the tuned model: 15, 75%, sigma=0.63, or last=6"})

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """1 for the base, then 1 for the tuned model; each with its own guidance scale."""
        return combined(base, tuned, Switch.parse(self.switch).index(sigmas))

    def reads(self, s: float, t: float) -> set[Read]:
        """Each model's guidance by itself."""
        return _read("guidance_scale", "tuned_guidance_scale", base=s != 1, tuned=t != 1)


@dataclass(frozen=True)
class RLGuidance:
    """RL guidance (arXiv:2508.21016): base + w·(tuned − base), with the same guidance scale in both.

    w = 0 is the base, 1 the tuned model, above 1 more than it was trained to. For RL with a KL penalty β, w acts as β/w.
    """

    weight: float = _weight(2.0, "weight w of the tuned model; 0 is the base, 1 the tuned model, above 1 extrapolates. Authors: 1 to 3")
    start: float = _start()
    end: float = _end()

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """1 − w and w, each model with guidance scale s."""
        return _within(base, replace(tuned, guidance_scale=base.guidance_scale), self.weight, self.start, self.end, len(sigmas) - 1)

    def reads(self, s: float, t: float) -> set[Read]:
        """s is the scale of both."""
        return _read("guidance_scale", base=s != 1, tuned=s != 1)


@dataclass(frozen=True)
class AIG:
    """Annealed interpolation (ImageReFL's code): (i/T)^p of the tuned model at step i of T, the rest of the base; each guided by itself."""

    power: float = field(default=2.0, metadata={"min": 0.01, "max": 100.0, "help": "power p of the schedule (i/T)^p; authors: 1 to 5"})

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """1 − (i/T)^p and (i/T)^p."""
        steps = len(sigmas) - 1

        def coefficients(i: int, sigma: float) -> tuple[float, float]:
            tuned_share = (i / steps) ** self.power
            return 1 - tuned_share, tuned_share

        return Mix((base, tuned), coefficients)

    def reads(self, s: float, t: float) -> set[Read]:
        """Each model's guidance by itself."""
        return _read("guidance_scale", "tuned_guidance_scale", base=s != 1, tuned=t != 1)


@dataclass(frozen=True)
class Autoguidance:
    """Autoguidance (arXiv:2406.02507): weak + w·(strong − weak) on the prompt, without classifier-free guidance; base is the weak model."""

    weight: float = _weight(2.0, "weight w of the stronger model; 1 is that model")
    start: float = _start()
    end: float = _end()

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """1 − w and w, without guidance inside."""
        weak, strong = _seeing(base, 1.0), _seeing(tuned, 1.0)
        return _within(weak, strong, self.weight, self.start, self.end, len(sigmas) - 1)

    def reads(self, s: float, t: float) -> set[Read]:
        """Both models see the prompt alone."""
        return _read()


@dataclass(frozen=True)
class NPO:
    """Diffusion-NPO and Self-NPO (arXiv:2505.11245, 2505.11777): negative(n) + s·(tuned(c) − negative(n)).

    The base is the negative model N: the tuned model's LoRA and, on top of it, one trained on flipped preferences, both at full strength.
    N equal to the tuned model gives classifier-free guidance.
    """

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """s on the tuned model's prompt, 1 − s on the base's negative."""
        s = base.guidance_scale
        return Mix((_seeing(tuned, 1.0), _seeing(base, 0.0)), lambda i, sigma: (s, 1 - s))

    def reads(self, s: float, t: float) -> set[Read]:
        """The base alone sees a negative."""
        return _read("guidance_scale", base=s != 1)


def by_negative(negative: Slot, sigmas: Tensor) -> Mix:
    """The model without an adapter, guided by a negative model, at the guidance scale of `negative`; ValueError where that is 1."""
    if negative.guidance_scale == 1:
        raise ValueError("guidance scale 1: a negative model takes part in guidance alone; give more than 1")
    return NPO().mix(negative, replace(negative, adapter="base"), sigmas)


@dataclass(frozen=True)
class CHATS:
    """CHATS (arXiv:2502.12579): W(c) + s·(W(c) − L(c̃)), winner W tuned and loser L base, with the proxy prompt c̃ = (1 + α)·n − α·c."""

    proxy: float = field(
        default=0.5,
        metadata={"min": -1.0, "max": 10.0, "help": "strength α of the proxy prompt (1 + α)·negative − α·prompt; 0 is the negative"},
    )

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """1 + s on the winner's prompt, −s on the loser's proxy prompt."""
        s = base.guidance_scale
        return Mix((_seeing(tuned, 1.0), _seeing(base, -self.proxy)), lambda i, sigma: (1 + s, -s))

    def reads(self, s: float, t: float) -> set[Read]:
        """The base alone sees a proxy prompt, which is the negative where proxy is 0 and the prompt where it is -1."""
        return _read("guidance_scale", base=s != 0 and self.proxy != -1, proxy=s != 0 and self.proxy not in (0, -1))


def by_loser(winner: Slot, loser: str, proxy: float, sigmas: Tensor) -> Mix:
    """CHATS's guidance of a winner by its loser, an adapter of that name, at the scale s of `winner`; ValueError where that is 0."""
    if winner.guidance_scale == 0:
        raise ValueError("guidance scale 0: CHATS's loser takes no part in it; give more (authors 5)")
    return CHATS(proxy).mix(replace(winner, adapter=loser), winner, sigmas)


@dataclass(frozen=True)
class DoubleCFG:
    """Guidance by both models at once, as ProFusion (arXiv:2305.13579): tuned(n) + s_b·(base(c) − base(n)) + s_t·(tuned(c) − tuned(n))."""

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """s_b and s_t are the guidance scales of base and tuned model."""
        s, t = base.guidance_scale, tuned.guidance_scale
        return Mix(_branches(base, tuned, (1.0, 0.0)), lambda i, sigma: (s, -s, t, 1 - t))

    def reads(self, s: float, t: float) -> set[Read]:
        """Both scales and both negatives."""
        return _read("guidance_scale", "tuned_guidance_scale", base=s != 0, tuned=t != 1)


@dataclass(frozen=True)
class Custom:
    """Coefficients of one's own at noise levels."""

    table: str = field(
        default="",
        metadata={
            "help": "rows `σ: coefficients` of sum 1, separated by `;`, σ falling. Two: base, tuned. Four: base on the prompt and "
            "on the negative, tuned likewise. Six: on prompt, negative and proxy prompt"
        },
    )
    interpolation: Literal["step", "linear"] = field(
        default="step", metadata={"help": "between rows: step keeps a row down to the next row's σ, linear interpolates in σ"}
    )
    proxy: float = field(
        default=0.5,
        metadata={"min": -1.0, "max": 10.0, "help": "strength α of the proxy prompt (1 + α)·negative − α·prompt; 0 is the negative"},
    )

    def __post_init__(self) -> None:
        parse_table(self.table)

    def mix(self, base: Slot, tuned: Slot, sigmas: Tensor) -> Mix:
        """Above the first row's σ the first row holds, below the last row's the last. No guidance inside."""
        rows = parse_table(self.table)
        seen = {2: (1.0,), 4: (1.0, 0.0), 6: (1.0, 0.0, -self.proxy)}[len(rows[0][1])]
        return Mix(_branches(base, tuned, seen), lambda i, sigma: row_at(rows, sigma, self.interpolation == "linear"))

    def reads(self, s: float, t: float) -> set[Read]:
        """What a coefficient is on."""
        used = [any(column) for column in zip(*(values for _, values in parse_table(self.table)))]
        models = used[: len(used) // 2], used[len(used) // 2 :]
        proxy = [len(model) == 3 and model[2] and self.proxy != -1 for model in models]
        base, tuned = (len(model) > 1 and (model[1] or seen) for model, seen in zip(models, proxy))
        return _read(base=base, tuned=tuned, proxy=any(proxy) and self.proxy != 0)


def _seeing(slot: Slot, prompt_weight: float) -> Slot:
    """The slot without guidance, on a prompt of that weight."""
    return replace(slot, guidance_scale=1.0, prompt_weight=prompt_weight)


def _branches(base: Slot, tuned: Slot, weights: Sequence[float]) -> tuple[Slot, ...]:
    return tuple(_seeing(slot, weight) for slot in (base, tuned) for weight in weights)


GUIDES: Mapping[str, type[Guide]] = {
    "combined": Combined,
    "rl": RLGuidance,
    "aig": AIG,
    "autoguidance": Autoguidance,
    "npo": NPO,
    "chats": CHATS,
    "double-cfg": DoubleCFG,
    "custom": Custom,
}
"""Guides by name."""
OF_TWO = ("rl", "aig", "autoguidance", "double-cfg")
"""Those that are nothing but the model's own guidance where there is one model."""
TRAINED: Mapping[str, tuple[str, str]] = {"npo": ("", "the negative model"), "chats": ("CHATS's winner", "CHATS's loser")}
"""Guides that LoRAs are trained for: what such a LoRA is in the tuned model, and in the base."""


def misplaced(guide: str, metadata: Mapping[str, Any], tuned: bool) -> str:
    """What a LoRA is by its file's metadata, where the guide that it was trained for has it in the other model; otherwise "".

    tuned: whether it is given for the tuned model, not for the base.
    """
    if guide not in TRAINED or metadata.get("guide") != guide:
        return ""
    ours, others = TRAINED[guide]
    of_base = not ours or "adapter" in metadata
    return "" if of_base != tuned else others if of_base else ours


def step_at(sigmas: Sequence[float], sigma: float) -> int:
    """The step of an evaluation at σ, for falling levels (T+1,): a step begins with the evaluations at its own level, as a switch does."""
    return max(0, sum(sigma <= level * MARGIN for level in sigmas[:-1]) - 1)
