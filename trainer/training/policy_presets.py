"""The rows of policy gradients in the table of presets."""

from __future__ import annotations

from .preset_types import Line, Method, Row, guidance, steps_of

_SDXL = 4 * 128 * 128  # elements of a latent: no more are Stable Diffusion's, all flow models here have more channels
_GROUPS = 8, 8  # images of a prompt, prompts of a round


def _rounds(group: int, prompts: int) -> list[Line]:
    return [("group", str(group), "images of a prompt, which are compared"), ("prompts_per_round", str(prompts), "")]


def _ddpo(row: Row, name: str) -> list[Line]:
    return [
        steps_of(row),
        guidance(row, 5.0),
        *_rounds(*_GROUPS),
        ("trained_count", str(min(10, row.steps - 1)), "of the steps with noise, each image's own"),
        ("clip", "1e-4", ""),
    ]


def _flow_grpo(row: Row, name: str) -> list[Line]:
    return [
        ("steps", str(min(10, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        guidance(row),
        *_rounds(24, 4),
        ("noise", "0.7", ""),
        *(
            [("noise_kind", '"cps"', "Flow-GRPO's own step adds more noise than Stable Diffusion's last levels have")]
            if row.latent <= _SDXL
            else []
        ),
        ("clip", "1e-4", ""),
        ("kl_weight", "0.001", "the official 0.01 for PickScore leaves out the step's length, about 0.1"),
    ]


def _awm(row: Row, name: str) -> list[Line]:
    return [
        ("steps", str(min(14, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        ("guidance_scale", "1.0", "none, which training makes up for"),
        *_rounds(24, 4),
        ("levels", "6", "noise levels of an image"),
        ("kl_weight", "0.001", ""),
    ]


def _nft(row: Row, name: str) -> list[Line]:
    return [
        ("steps", str(min(10, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        ("guidance_scale", "1.0", "none, which training makes up for"),
        *_rounds(24, 4),
        ("beta", "1.0", "0.1 for several rewards"),
        ("kl_weight", "1e-4", ""),
    ]


_UNIT: Line = ("standardise", "false", "advantages have no unit")
POLICY_GRADIENTS: dict[str, Method] = {
    "ddpo": Method(
        "DDPO",
        "the official SD1.4 settings, but for a round of 64 images instead of 256, of which 10 steps are trained and not 50",
        _ddpo,
        steps=("steps", "200", "two to a round"),
        samples=320,
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""),),
        standardise=_UNIT,
        every=20,
        save_every=10,
    ),
    "flow-grpo": Method(
        "Flow-GRPO",
        "the official settings for SD3.5 medium, but for a round of 4 prompts instead of 48",
        _flow_grpo,
        steps=("steps", "300", ""),
        samples=432,
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.9", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "awm": Method(
        "AWM",
        "the official settings for SD3.5 medium, but for a round of 4 prompts and no second KL",
        _awm,
        steps=("steps", "300", "one to a round"),
        samples=576,
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.99", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "diffusion-nft": Method(
        "DiffusionNFT",
        "the official settings for SD3.5 medium, but for a round of 4 prompts instead of 48, and DDIM instead of DPM-Solver",
        _nft,
        steps=("steps", "300", "one to a round"),
        samples=864,
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.9", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
}
"""By the name of an objective."""
