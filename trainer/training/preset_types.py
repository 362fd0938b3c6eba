"""What a preset takes from a model and from a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Line = tuple[str, str, str]
"""Key, value as TOML, comment."""


@dataclass(frozen=True)
class Row:
    """What a preset takes from the model. `start` is ImageReFL's first of 40 steps (few-step models: of `steps`)."""

    title: str
    folder: str
    guidance_scale: float
    start: int
    steps: int = 25
    rank: int = 16
    batch: int = 1
    latent: int = 16 * 128 * 128
    size: int = 1024
    file: str = "a diffusers folder"
    consistency: str = ""
    few: bool = False
    guidance_note: str = ""
    line: str = ""
    """`flux1`, `klein` or `sd35`, of which some methods publish settings."""
    training_adapter: str = ""
    """Of a few-step model: the published LoRA that undoes its distillation."""
    turbo: tuple[str, int] = ("", 0)
    """Of a base model: the folder of its few-step model, and that one's steps."""

    @property
    def chain(self) -> int:
        """Sampler steps of ReFL and ImageReFL: 40 in the papers."""
        return self.steps if self.few else 40


def nothing(row: Row) -> list[Line]:
    """No lines."""
    return []


def everything(row: Row) -> list[Line]:
    """Denoiser, decoder and reward are recomputed."""
    return [(f"gradient_checkpointing_{part}", "true", "") for part in ("denoiser", "vae", "reward")]


@dataclass(frozen=True)
class Method:
    """What a preset takes from the method; `samples` are those of one optimizer step, or a rule for them, `least` of a micro-batch."""

    origin: str
    objective: Callable[[Row], list[Line]]
    data: str = "prompts"
    steps: Line = ("steps", "1000", "")
    samples: int | Callable[[Row], int] = 32
    least: int = 1
    rate: str = "1e-4"
    more: tuple[Line, ...] = ()
    reward: str = "hpsv2.1"
    standardise: Line = ("standardise", "false", "a single loss: its unit does not matter")
    heldout: str = "imagereward"
    every: int = 100
    save_every: int = 50
    inputs: Callable[[Row], list[Line]] = nothing
    """Files that it reads beside the data and the reward."""
    watch: Callable[[Row], list[Line]] = nothing
    """How its evaluations differ from others."""
    recomputed: Callable[[Row], list[Line]] = everything
    """What the backward pass recomputes."""

    def samples_of(self, row: Row) -> int:
        """Samples of an optimizer step."""
        return self.samples if isinstance(self.samples, int) else self.samples(row)


def quote(text: str) -> str:
    """A text as TOML."""
    return f'"{text}"'


def guidance(row: Row, scale: float | None = None) -> Line:
    """The guidance scale of a model, or `scale` where the method has its own; 1 where the model takes none."""
    return (
        "guidance_scale",
        f"{row.guidance_scale if scale is None or row.guidance_scale == 1 else scale:.1f}",
        row.guidance_note if scale is None else "",
    )


def steps_of(row: Row, note: str = "") -> Line:
    """The sampler steps of a model."""
    return ("steps", str(row.steps), "the model's own few steps" if row.few else note)
