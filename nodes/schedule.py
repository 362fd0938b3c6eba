"""LoRAs that are on for a range of noise levels: what every switch, and every LoRA in a range, comes to.

The rule is exact for every sampler: a part that begins with step k takes each evaluation with σ ≤ σ_k (1 + 1e-4), where σ_k is
the noise level of step k of the steps actually run. Evaluations between steps fall on their own side of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension
import torch

from ..trainer.guidance import MARGIN
from . import host
from .gate import Patches, gated, without_gate

KEY = "imagerefl_switch"
SCHEDULE = "imagerefl_schedule"  # a MODEL's LoRAs in ranges, under this key of its attachments
LEVEL = "imagerefl_sigma"  # in the transformer options of an evaluation: its σ as a float, where that is known

When = Callable[[float, dict[str, Any]], bool]
"""Whether something is on, from the σ of an evaluation and the transformer options of its sampling run."""


@dataclass(frozen=True)
class Rule:
    """From a point of the sampling run on: a step, a share of the steps, the last n steps, or σ."""

    mode: str
    at: float
    _last: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def sigma(self, sigmas: torch.Tensor) -> float:
        """The largest σ evaluated after that point, for levels (T+1,); infinity is from the start, −1 never."""
        levels = sigmas.tolist()  # one wait for the GPU, once per run
        steps = len(levels) - 1
        if steps > 0 and levels[0] < levels[-1]:
            raise ValueError("noise levels rise in this run (flipped sigmas): a switch or a LoRA in a range needs levels that fall")
        if self.mode == "sigma":
            return self.at * MARGIN
        k = {"step": round(self.at), "fraction": round(self.at * steps), "last steps": steps - round(self.at)}[self.mode]
        if not 0 <= k <= steps:
            raise ValueError(f"the switch at {self.mode} {self.at:g} lies outside the {steps} steps that are run")
        if k == 0:
            return float("inf")
        return levels[k] * MARGIN if k < steps else -1.0

    def __call__(self, level: float, options: dict[str, Any]) -> bool:
        """Whether an evaluation at σ = level comes after that point."""
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            return False
        if self._last.get("sigmas") is not sigmas:
            self._last.update(sigmas=sigmas, sigma=self.sigma(sigmas))
        return level <= self._last["sigma"]


@dataclass(frozen=True)
class Between:
    """From one point of the sampling run up to another, or to its end. A share or a number of steps must have a step in it."""

    first: Rule
    end: Rule | None = None
    _last: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __call__(self, level: float, options: dict[str, Any]) -> bool:
        """Whether an evaluation at σ = level lies between."""
        sigmas = options.get("sample_sigmas")
        if sigmas is not None and self._last.get("sigmas") is not sigmas:
            self._check(sigmas)
            self._last["sigmas"] = sigmas
        return self.first(level, options) and not (self.end is not None and self.end(level, options))

    def _check(self, sigmas: torch.Tensor) -> None:
        if self.first.mode == "sigma":  # one pass of several may lie outside
            return
        high, low = self.first.sigma(sigmas), -1.0 if self.end is None else self.end.sigma(sigmas)
        if not any(low < sigma <= high for sigma in sigmas[:-1].tolist()):
            end = "the end" if self.end is None else f"{self.end.at:g}"
            raise ValueError(f"no step of the {len(sigmas) - 1} lies from {self.first.mode} {self.first.at:g} to {end}: give a wider range")


def both(a: When, b: When) -> When:
    """On where both are."""
    return lambda level, options: a(level, options) and b(level, options)


def until(end: When) -> When:
    """On up to the point from which `end` is."""
    return lambda level, options: not end(level, options)


@dataclass(frozen=True, eq=False)
class Scheduled:
    """Patches over a model's weights, and when they are on."""

    patches: Patches
    when: When


def level_of(t: torch.Tensor, options: dict[str, Any]) -> float:
    """The σ of an evaluation at t (B,). Reading it waits for the GPU, which our guider does once per step."""
    known = options.get(LEVEL)
    return float(t.max()) if known is None else known


def schedule_of(model: Any) -> tuple[Scheduled, ...]:
    """The LoRAs in ranges that a MODEL has."""
    return model.get_attachment(SCHEDULE) or ()


def bare(model: Any) -> Any:
    """A clone of a MODEL without its LoRAs in ranges; whatever else was put on it stays."""
    if not schedule_of(model):
        return model
    found = without_gate(model)
    wrappers = comfy.patcher_extension.WrappersMP
    for kind in (wrappers.APPLY_MODEL, wrappers.OUTER_SAMPLE):
        found.remove_wrappers_with_key(kind, KEY)
    found.remove_attachments(SCHEDULE)
    return found


def scheduled(model: Any, entries: Sequence[Scheduled]) -> Any:
    """A clone of a bare MODEL with LoRAs in ranges: no copy of the weights, and exact in every storage of them."""
    if host.PROBLEM:
        raise ValueError(host.PROBLEM)
    made, gate = gated(model, [entry.patches for entry in entries])

    def route(executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **kwargs: Any) -> Any:
        level = level_of(t, options)
        on = tuple(i for i, entry in enumerate(entries) if entry.when(level, options))
        with gate.applied(executor.class_obj, on, x):  # the network of this GPU, where there are several
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with gate.sampling(executor.class_obj.model_patcher):
            return executor(*args, **kwargs)

    wrappers = comfy.patcher_extension.WrappersMP
    made.add_wrapper_with_key(wrappers.APPLY_MODEL, KEY, route)
    made.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, run)
    made.set_attachments(SCHEDULE, tuple(entries))
    return made
