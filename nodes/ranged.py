"""A LoRA that is on for a part of the sampling steps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import lora
from .residency import split
from .schedule import Between, Rule, Scheduled, When, bare, schedule_of, scheduled
from .sockets import CATEGORY, schema
from .switch import SWITCHED, rule

MODES = ["fraction", "step", "sigma", "auto"]
LAST = 10000  # an end at this step is the end of the run, as in the stock samplers


def when(tuned: Any, mode: str, start: float, end: float) -> When:
    """The range of the widgets. ValueError where nothing lies in it."""
    if mode == "auto":
        return rule(tuned, mode, start)
    if (start <= end) if mode == "sigma" else (start >= end):
        order = "start, the higher noise level, above end" if mode == "sigma" else "start before end"
        raise ValueError(f"no {mode} lies from {start:g} to {end:g}: give {order}")
    if mode == "fraction" and not 0 <= start < end <= 1:
        raise ValueError(f"fractions {start:g} to {end:g}: give shares of the steps, from 0 to 1")
    first = Rule(mode, start)
    last = end >= LAST if mode == "step" else end == 1.0 if mode == "fraction" else end == 0.0
    return Between(first, None if last else Rule(mode, end))


class RangedLora(io.ComfyNode):
    """MODEL -> MODEL with a LoRA in a range of steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLRangedLora",
            display_name="LoRA in a Range of Steps",
            category=f"{CATEGORY}/sampling",
            description="Loads a LoRA that is on for some of the sampling steps only: the first ones, the last ones, or any between. "
            "Works with every sampler node, several of these nodes in a row, and before a Base→Tuned Switch.",
            search_aliases=["lora schedule", "lora start end step", "scheduled lora", "load lora at step"],
            inputs=[
                io.Model.Input("model", tooltip="The model, with or without other LoRAs."),
                io.Combo.Input(
                    "lora_name",
                    options=lora.names(),
                    tooltip="demo-*: for the demo model. run: …: the result of a training run here. Others: files in models/loras.",
                ),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="1 is as trained."),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="fraction",
                    tooltip="How start and end are read: share of all steps, step, or σ. auto: from the level the LoRA was trained from to "
                    "the end (start and end are ignored; needs a LoRA trained by ImageReFL).",
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=10000.0, step=0.01, tooltip="On from here: fraction 0 and step 0 are the start."
                ),
                io.Float.Input(
                    "end",
                    default=0.25,
                    min=0.0,
                    max=10000.0,
                    step=0.01,
                    tooltip="Off from here: 2 means steps 0 and 1. Fraction 1, step 10000 and σ 0 are the end.",
                ),
            ],
            outputs=[io.Model.Output("ranged", display_name="MODEL", tooltip="Use it in any sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        """A file may change under its name."""
        return lora.stamp(lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float, mode: str, start: float, end: float) -> io.NodeOutput:
        """The model with the LoRA in its range."""
        own = bare(model)
        tuned, _ = lora.load(own, lora.path_of(lora_name), strength)
        return io.NodeOutput(ranged(model, own, tuned, when(tuned, mode, start, end)))


def ranged(model: Any, own: Any, tuned: Any, on: When) -> Any:
    """`model` with what `tuned` has over it in a range. own: `model` when bare, of which `tuned` is a clone."""
    if model.get_attachment(SWITCHED) and not schedule_of(model):
        raise ValueError("model is a switch between two checkpoints: load the LoRA on one of the models that go into it")
    _, _, patches = split(own, tuned)
    return scheduled(own, [*schedule_of(model), Scheduled(patches, on)])


NODES = [RangedLora]
