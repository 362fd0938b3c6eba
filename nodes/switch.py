"""Combined generation in a graph: a MODEL that is the base down to a noise level and the tuned model from there on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io

from .residency import check_same_family, split
from .schedule import KEY, Rule, Scheduled, When, bare, both, level_of, schedule_of, scheduled, until
from .sockets import CATEGORY, schema

MODES = ["auto", "step", "fraction", "last steps", "sigma"]
ATTACHMENT = "imagerefl"  # a MODEL's LoRA metadata, under this key of its attachments
SWITCHED = "imagerefl_switched"  # marks the MODEL of a switch


def rule(tuned: Any, mode: str, at: float) -> Rule:
    """The rule of the widgets; `auto` reads the level that the tuned model's LoRA recommends."""
    if mode != "auto":
        return Rule(mode, at)
    recommended = (tuned.get_attachment(ATTACHMENT) or {}).get("switch_sigma")
    if recommended is None:
        raise ValueError("auto needs a LoRA that says where to switch: load one trained by ImageReFL with Load Reward LoRA")
    return Rule("sigma", float(recommended))


def switched(base: Any, tuned: Any, tuned_now: When, strength: float = 1.0) -> Any:
    """Base and tuned MODEL as one. LoRA clones share one set of weights; two checkpoints stay resident together."""
    for which, model in (("base", base), ("tuned", tuned)):
        if model.get_attachment(SWITCHED):
            raise ValueError(f"the {which} model is a switch already: connect the model that went into that switch")
    ranged = schedule_of(base), schedule_of(tuned)
    if base.is_clone(tuned):
        base, tuned = bare(base), bare(tuned)
        check_same_family(base, tuned)
        model = _shared(base, tuned, ranged, tuned_now, strength)
    else:
        if strength != 1.0:
            raise ValueError(f"strength {strength:g}: between two checkpoints only 1 is possible; merge them first")
        if any(ranged):
            raise ValueError("a LoRA in a range works on one set of weights: load it on two clones of one checkpoint, or on neither of two")
        check_same_family(base, tuned)
        model = _both_resident(base, tuned, tuned_now)
    model.set_attachments(SWITCHED, True)
    return model


def _shared(base: Any, tuned: Any, ranged: tuple[Sequence[Scheduled], Sequence[Scheduled]], tuned_now: When, strength: float) -> Any:
    """Two clones of one model: what only one of them has is on in its own part."""
    base_now = until(tuned_now)
    before, after = ranged
    entries = [entry for entry in before if entry in after]
    entries += [Scheduled(e.patches, both(base_now, e.when)) for e in before if e not in after]
    entries += [Scheduled(e.patches, both(tuned_now, e.when)) for e in after if e not in before]
    apart = len(entries) > len([entry for entry in before if entry in after])
    model, early, late = split(base, tuned, strength, may_be_equal=apart)
    found = [Scheduled(patches, when) for patches, when in ((early, base_now), (late, tuned_now)) if patches]
    return scheduled(model, [*found, *entries])


def _both_resident(base: Any, tuned: Any, tuned_now: When) -> Any:
    model = base.clone()
    model.set_additional_models(KEY, [tuned])

    def route(executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **kwargs: Any) -> Any:
        if tuned_now(level_of(t, options), options):
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
            search_aliases=[
                "combined generation",
                "refiner",
                "switch model at step",
                "two models",
                "model swap",
                "high low noise",
                "variety",
            ],
            inputs=[*SWITCH_INPUTS],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="Use it in any sampler.")],
        )

    @classmethod
    def execute(cls, base: Any, tuned: Any, mode: str, switch_at: float, strength: float) -> io.NodeOutput:
        """The switched model."""
        return io.NodeOutput(switched(base, tuned, rule(tuned, mode, switch_at), strength))


NODES = [BaseTunedSwitch]
