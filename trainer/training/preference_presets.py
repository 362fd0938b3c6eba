"""The rows of objectives on preferences in the table of presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .preset_types import Line, Method, Row, guidance, steps_of


def _levels(row: Row) -> list[Line]:
    return [steps_of(row, "of evaluations; training draws from all noise levels"), guidance(row)]


def _dpo(row: Row) -> list[Line]:
    large = row.size > 512
    return [
        *_levels(row),
        ("beta", "5000.0", "" if row.latent <= 4 * 128 * 128 else "SD1.5's and SDXL's; not published for flow models"),
        ("mu", "0.6" if large else "0.9", f"the safeguard's, {'SDXL' if large else 'SD1.5'}'s"),
        ("prompt_dropout", "0.2", ""),
    ]


def _kto(row: Row) -> list[Line]:
    return [*_levels(row), ("beta", "1000.0", ""), ("prompt_dropout", "0.2", "")]


def _mapo(row: Row) -> list[Line]:
    return [*_levels(row), ("beta", "0.1", ""), ("scale", "0.5", ""), ("margin_scale", "1000.0", "")]


def _guiding(row: Row) -> list[Line]:
    """Of a negative model, which takes part in guidance above 1 alone."""
    steps, scale = _levels(row)
    if row.guidance_scale == 1:
        scale = ("guidance_scale", "1.0", "raise it: in evaluations the negative model takes part above 1 alone")
        scale = scale if row.few else ("guidance_scale", "3.5", "of evaluations, in which the negative model takes part above 1 alone")
    return [steps, scale]


def _npo(row: Row) -> list[Line]:
    return [*_guiding(row), ("beta", "2000.0" if row.size > 512 else "1000.0", "")]


def _dmpo(row: Row) -> list[Line]:
    large = row.size > 512
    beta: Line = ("beta", "6000.0" if large else "2000.0", "SDXL's" if large else "SD1.5's")
    return [*_levels(row), beta, ("alpha", "0.01", ""), ("mu", "0.6" if large else "0.9", ""), ("prompt_dropout", "0.2", "")]


def _dspo(row: Row) -> list[Line]:
    return [*_levels(row), ("beta", "0.001", "SD1.5's, whose loss this is"), ("mu", "0.2", ""), ("prompt_dropout", "0.2", "")]


def _inverting(row: Row) -> list[Line]:
    large = row.size > 512
    beta: Line = ("beta", "5000.0" if large else "2000.0", "SDXL's" if large else "SD1.5's, after supervised training on the better images")
    return [*_levels(row), beta]


def _inpo(row: Row) -> list[Line]:
    return [*_inverting(row), ("inversion_steps", "10", ""), ("inversion_noise", "0.1", "")]


def _smpo(row: Row) -> list[Line]:
    steps: Line = ("inversion_steps", "10" if row.size > 512 else "5", "")
    return [*_inverting(row), steps, ("score_range", "16.7", "PickScore's, on Pick-a-Pic")]


def _dro(row: Row) -> list[Line]:
    return [*_levels(row), ("margin", "0.001", ""), ("rollout_steps", "20", ""), ("prompt_dropout", "0.2", "")]


def _self_npo(row: Row) -> list[Line]:
    w: Line = ("anti_guidance", "-5.0", "SDXL's") if row.size > 512 else ("anti_guidance", "-1.0", "SD1.5's: the unconditional prediction")
    return [*_guiding(row), w, ("levels", "25", ""), ("rollout_steps", "5", ""), ("decay", "0.999", "")]


def _chats(row: Row) -> list[Line]:
    beta: Line = ("beta", "1000.0", "" if row.latent <= 4 * 128 * 128 else "SD1.5's and SDXL's; not published for flow models")
    scale: Line = ("guidance_scale", "1.0" if row.few else "5.0", "of evaluations by winner and loser, counted from 0")
    return [steps_of(row, "of evaluations; training draws from all noise levels"), scale, beta, ("loser_dropout", "0.5", "")]


def _tpo(row: Row) -> list[Line]:
    return [*_levels(row), ("form", '"dpo"', 'or "kto" with beta = 1000'), ("beta", "5000.0", "Diffusion-DPO's")]


_SHOWN: Line = ("standardise", "false", "the reward is shown by the watch, and not trained on")


def _on(data: str, origin: str, objective: Callable[[Row], list[Line]], **more: Any) -> Method:
    """A method on pairs, labels or images; 2000 steps of 64 at a LoRA's rate where nothing else is said."""
    usual = Method(origin, objective, data, ("steps", "2000", ""), 64, rate="1e-5", standardise=_SHOWN, every=200)
    return replace(usual, **more)


PREFERENCES: dict[str, Method] = {
    "diffusion-dpo": _on(
        "pairs",
        "β of the official code and μ of SDPO's, for all weights and 2048 pairs a step; rate and number of pairs are a LoRA's",
        _dpo,
    ),
    "diffusion-kto": _on(
        "labels", "β of the official code, for all weights of SD1.5; rate and number of images are a LoRA's", _kto, least=4
    ),
    "mapo": _on("pairs", "the official SDXL settings, but for the rank of 8", _mapo, samples=16),
    "dspo": _on(
        "pairs",
        "β of the official SD1.5 script and μ of SDPO's code, for all weights and 2048 pairs a step; rate and number are a LoRA's",
        _dspo,
    ),
    "dmpo": _on(
        "pairs",
        "the settings of SDPO's code, for all weights of SD1.5 and SDXL and 2048 pairs a step; rate and number are a LoRA's",
        _dmpo,
    ),
    "inpo": _on(
        "pairs",
        "the official settings, for all weights and 1024 pairs a step; rate and number of pairs are a LoRA's",
        _inpo,
        steps=("steps", "400", ""),
        every=50,
    ),
    "smpo": _on(
        "pairs",
        "the official settings, for all weights and 1024 pairs a step; rate and number of pairs are a LoRA's",
        _smpo,
        steps=("steps", "200", ""),
        reward="pickscore",
        standardise=("standardise", "false", "score_range is in the reward's own unit"),
        every=25,
    ),
    "diffusion-npo": _on(
        "pairs",
        "the official settings for SD1.5 and SDXL, but for the rank of 8; the result is the negative model of the guide npo",
        _npo,
        rate="5e-6",
    ),
    "self-npo": _on(
        "images",
        "the official settings for all weights; rate and number of images are a LoRA's; the result is the negative model of the guide npo",
        _self_npo,
        steps=("steps", "1000", ""),
        samples=16,
        every=100,
    ),
    "chats": _on(
        "pairs",
        "the official settings for all weights of SDXL and SD1.5; rate and number of pairs are a LoRA's, of which two are trained",
        _chats,
        steps=("steps", "6000", "SD1.5: 2000"),
    ),
    "dro": _on(
        "images",
        "the official settings for all weights of SD1.5: 1600 steps on 500 images of the highest rewards",
        _dro,
        steps=("steps", "1600", ""),
        rate="1e-4",
    ),
    "tpo": _on("images", "from the paper, with Diffusion-DPO's β; rate and number of images are a LoRA's", _tpo),
}
"""By the name of an objective."""
