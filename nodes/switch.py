"""Combined generation in a graph: a MODEL that is the base down to a noise level and the tuned model from there on.

The rule is exact for every sampler: *tuned for each evaluation with σ ≤ σ_k (1 + 1e-4)*, where σ_k is the noise level of
step k of the steps actually run. Evaluations between steps fall on their own side of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from .residency import KEY, check_same_family, gated
from .sockets import CATEGORY, schema

MODES = ["auto", "step", "fraction", "last steps", "sigma"]
ATTACHMENT = "imagerefl"  # a MODEL's LoRA metadata, under this key of its attachments
DECIDED = "imagerefl_tuned"  # in the transformer options of an evaluation: whether it is the tuned model's, where that is known
_MARGIN = 1 + 1e-4

TunedNow = Callable[[torch.Tensor, dict[str, Any]], bool]


@dataclass(frozen=True)
class Rule:
    """Which evaluations are the tuned model's, from their σ and the transformer options of the sampling run."""

    mode: str
    at: float
    _last: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def sigma(self, sigmas: torch.Tensor) -> float:
        """The largest σ that the tuned model evaluates, for levels (T+1,); infinity is tuned only, −1 base only."""
        steps = len(sigmas) - 1
        if self.mode == "sigma":
            return self.at * _MARGIN
        k = {"step": round(self.at), "fraction": round(self.at * steps), "last steps": steps - round(self.at)}[self.mode]
        if not 0 <= k <= steps:
            raise ValueError(f"the switch at {self.mode} {self.at:g} lies outside the {steps} steps that are run")
        if k == 0:
            return float("inf")
        return float(sigmas[k]) * _MARGIN if k < steps else -1.0

    def __call__(self, t: torch.Tensor, options: dict[str, Any]) -> bool:
        """Whether an evaluation at t (B,) is the tuned model's."""
        if DECIDED in options:
            return options[DECIDED]
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            return False
        if self._last.get("sigmas") is not sigmas:  # reading a level waits for the GPU: once per run
            self._last.update(sigmas=sigmas, sigma=self.sigma(sigmas))
        return float(t.max()) <= self._last["sigma"]


def rule(tuned: Any, mode: str, at: float) -> Rule:
    """The rule of the widgets; `auto` reads the level that the tuned model's LoRA recommends."""
    if mode != "auto":
        return Rule(mode, at)
    recommended = (tuned.get_attachment(ATTACHMENT) or {}).get("switch_sigma")
    if recommended is None:
        raise ValueError("auto needs a LoRA that says where to switch: load one trained by ImageReFL with Load Reward LoRA")
    return Rule("sigma", float(recommended))


def switched(base: Any, tuned: Any, tuned_now: TunedNow, strength: float = 1.0) -> Any:
    """Base and tuned MODEL as one. LoRA clones share one set of weights; two checkpoints stay resident together."""
    check_same_family(base, tuned)
    if base.is_clone(tuned):
        model, gate = gated(base, tuned, strength)

        def route(executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **kwargs: Any) -> Any:
            with gate.applied(executor.class_obj, tuned_now(t, options)):  # the network of this GPU, where there are several
                return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    else:
        if strength != 1.0:
            raise ValueError(f"strength {strength:g}: between two checkpoints only 1 is possible; merge them first")
        model = base.clone()
        model.set_additional_models(KEY, [tuned])

        def route(executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **kwargs: Any) -> Any:
            if tuned_now(t, options):
                # not apply_model: the wrappers in `options` would call this function again
                return tuned.model._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY, route)
    return model


SWITCH_INPUTS = [
    io.Model.Input("base", tooltip="The model that draws the first steps."),
    io.Model.Input("tuned", tooltip="The same model with the reward LoRA loaded on it, or another checkpoint of the family."),
    io.Combo.Input(
        "mode",
        options=MODES,
        default="fraction",
        tooltip="How switch_at is read: step k, share of all steps, last n steps, or σ. auto: the level the LoRA was trained from "
        "(switch_at is ignored; needs Load Reward LoRA).",
    ),
    io.Float.Input(
        "switch_at",
        default=0.75,
        min=0.0,
        max=10000.0,
        step=0.01,
        tooltip="Where the tuned model takes over. The paper uses step 30 of 40 for SD1.5 (fraction 0.75, σ 0.635) and 35 of 40 for SDXL "
        "(σ 0.346). Step 0 is the tuned model alone, the last step the base alone.",
    ),
    io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, tooltip="Strength of the tuned part's LoRA; 1 as loaded."),
]
"""The inputs that say which two models, and where one hands over to the other."""


class BaseTunedSwitch(io.ComfyNode):
    """MODEL + MODEL -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSwitch",
            display_name="Base→Tuned Switch",
            category=f"{CATEGORY}/sampling",
            description="The base model draws the first steps (layout, variety), the reward-tuned model the last ones (finish). "
            "Works with every sampler node. A LoRA on the base shares its weights.",
            search_aliases=["combined generation", "refiner", "switch model at step"],
            inputs=[*SWITCH_INPUTS],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="Use it in any sampler.")],
        )

    @classmethod
    def execute(cls, base: Any, tuned: Any, mode: str, switch_at: float, strength: float) -> io.NodeOutput:
        """The switched model."""
        return io.NodeOutput(switched(base, tuned, rule(tuned, mode, switch_at), strength))


NODES = [BaseTunedSwitch]
