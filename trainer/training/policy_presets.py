"""The rows of policy gradients and of step preferences in the table of presets."""

from __future__ import annotations

from collections.abc import Callable

from ..config import build, override
from ..objectives import AWM, DDPO, G2RPO, PSO, SPO, DiffusionNFT, FlowGRPO
from ..objectives.policy_gradient.collecting import Collecting
from .preset_types import Line, Method, Row, guidance, quote

_SDXL = 4 * 128 * 128  # elements of a latent: no more are Stable Diffusion's, all flow models here have more channels
_GROUPS = 8, 8  # images of a prompt, prompts of a round


def _rounds(group: int, prompts: int) -> list[Line]:
    return [("group", str(group), "images of a prompt, which are compared"), ("prompts_per_round", str(prompts), "")]


def _ddpo(row: Row) -> list[Line]:
    steps = min(20, row.steps)
    return [
        ("steps", str(steps), "the model's own few steps" if row.few else "drawn later with more"),
        guidance(row, 5.0),
        *_rounds(*_GROUPS),
        ("trained_count", str(steps // 2), "the noisier half: the last steps' gradient is largest, decides nothing, and drowns the rest"),
        ("window", quote("sliding"), "consecutive steps from the noisiest on; the others add no noise"),
        ("window_every", "100000", "rounds, so many that the window stays there"),
        ("clip", "1e-4", ""),
    ]


def _flow_grpo(row: Row) -> list[Line]:
    return [
        ("steps", str(min(10, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        guidance(row),
        *_rounds(24, 4),
        ("noise", "0.7", ""),
        *(
            [("noise_kind", quote("cps"), "Flow-GRPO's own step adds more noise than Stable Diffusion's last levels have")]
            if row.latent <= _SDXL
            else []
        ),
        ("clip", "1e-4", ""),
        ("kl_weight", "0.001", "the official 0.01 for PickScore leaves out the step's length, about 0.1"),
    ]


def _g2rpo(row: Row) -> list[Line]:
    steps = min(16, row.steps)
    return [
        ("steps", str(steps), "the model's own few steps" if row.few else "drawn later with more"),
        guidance(row),
        *_rounds(12, 8),
        ("branch_steps", str(steps // 2), "at one of the first half of the steps a round's images part"),
        ("granularities", "2", "each is finished in all remaining steps, and in every second one"),
        ("noise", "0.7", ""),
        ("clip", "1e-4", ""),
    ]


def _awm(row: Row) -> list[Line]:
    return [
        ("steps", str(min(14, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        ("guidance_scale", "1.0", "none, which training makes up for"),
        *_rounds(24, 4),
        ("levels", "6", "noise levels of an image"),
        ("kl_weight", "0.001", ""),
    ]


def _nft(row: Row) -> list[Line]:
    return [
        ("steps", str(min(10, row.steps)), "the model's own few steps" if row.few else "drawn later with more"),
        ("guidance_scale", "1.0", "none, which training makes up for"),
        *_rounds(24, 4),
        ("beta", "1.0", "0.1 for several rewards"),
        ("kl_weight", "1e-4", ""),
    ]


def _spo(row: Row) -> list[Line]:
    steps, large = min(20, row.steps), row.size > 512
    return [
        ("steps", str(steps), "the model's own few steps" if row.few else "drawn later with more"),
        guidance(row, 5.0),
        ("group", "2" if large else "4", f"next states of a state: {'SDXL' if large else 'SD1.5'}'s"),
        ("prompts_per_round", "8", ""),
        ("first_step", str(steps // 5), "no pairs before it: 4 of 20"),
        ("beta", "10.0", "LPO: 500, with first_step = 0, gap = 0.35 and gap_noisiest = 0.5"),
        ("gap", "0.4" if large else "0.3", "between the softmax of two scores, in PickScore's own unit"),
    ]


def _pso(row: Row) -> list[Line]:
    return [
        (
            "steps",
            str(row.steps if row.few else 4),
            "the model's own few steps" if row.few else "for a few-step model: name one as `model`",
        ),
        ("guidance_scale", "1.0", "none"),
        ("group", "2", "images of a prompt"),
        ("prompts_per_round", "16", ""),
        ("beta", "50.0", ""),
        ("transition", quote("ancestral"), 'SDXL-Turbo\'s; LCM and DMD2 have "renoised"'),
    ]


def _share(objective: type[Collecting], settings: Callable[[Row], list[Line]], parts: int) -> Callable[[Row], int]:
    """Samples of an optimizer step of which `parts` train a round, whatever number of steps the model has."""

    def samples(row: Row) -> int:
        one = build(objective, override({}, [f"--{key}={value}" for key, value, _ in settings(row)]))
        return one.rollouts * one.trained // parts

    return samples


_UNIT: Line = ("standardise", "false", "advantages have no unit")
_RAW: Line = ("standardise", "false", "PickScore's own unit")
POLICY_GRADIENTS: dict[str, Method] = {
    "ddpo": Method(
        "the official SD1.4 settings, but for rounds of 64 images, not 256, and the noisier half of 20 steps, not all 50",
        _ddpo,
        steps=("steps", "200", "two to a round"),
        samples=_share(DDPO, _ddpo, 2),
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""),),
        standardise=_UNIT,
        every=20,
        save_every=10,
    ),
    "flow-grpo": Method(
        "the official settings for SD3.5 medium, but for a round of 4 prompts instead of 48",
        _flow_grpo,
        steps=("steps", "300", ""),
        samples=_share(FlowGRPO, _flow_grpo, 2),
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.9", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "g2rpo": Method(
        "the official settings for FLUX.1, but for an adapter at Flow-GRPO's rate, and one step of 8 prompts a round, not 8 steps of 16",
        _g2rpo,
        steps=("steps", "300", "one to a round"),
        samples=_share(G2RPO, _g2rpo, 1),
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""),),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "awm": Method(
        "the official settings for SD3.5 medium, but for a round of 4 prompts and no second KL",
        _awm,
        steps=("steps", "300", "one to a round"),
        samples=_share(AWM, _awm, 1),
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.99", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "diffusion-nft": Method(
        "the official settings for SD3.5 medium, but for a round of 4 prompts instead of 48, and DDIM instead of DPM-Solver",
        _nft,
        steps=("steps", "300", "one to a round"),
        samples=_share(DiffusionNFT, _nft, 1),
        rate="3e-4",
        more=(("weight_decay", "1e-4", ""), ("ema", "0.9", "")),
        standardise=_UNIT,
        every=30,
        save_every=10,
    ),
    "spo": Method(
        "the official settings for SD1.5 and SDXL, but for the ranks, SDXL's rate of 1e-5, and a judge that is not given the timestep",
        _spo,
        steps=("steps", "1000", "three to a round; of its samples only pairs whose scores differ enough train"),
        samples=_share(SPO, _spo, 3),
        rate="6e-5",
        more=(("weight_decay", "1e-4", ""),),
        reward="pickscore",
        standardise=_RAW,
        heldout="hpsv2.1",
    ),
    "pso": Method(
        "the official settings for SDXL-Turbo, but for ranks of 16 and 32",
        _pso,
        steps=("steps", "1000", "two to a round"),
        samples=_share(PSO, _pso, 2),
        rate="1e-5",
        more=(("weight_decay", "1e-6", ""),),
        reward="pickscore",
        standardise=_RAW,
        heldout="hpsv2.1",
    ),
}
"""By the name of an objective."""
