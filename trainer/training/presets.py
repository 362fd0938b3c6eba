"""The table of presets: settings of every objective, and of every published model.

A model's row has its size, sampler, guidance and adapter; a method's has those of its paper or official code. Where a paper
has no such model, noise levels are carried over at equal signal-to-noise ratio, and what counts sampler steps by the share of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .policy_presets import POLICY_GRADIENTS
from .preference_presets import PREFERENCES
from .preset_types import Line, Method, Row, everything, guidance, quote, steps_of

_CHECKPOINT = "a diffusers folder, or a .safetensors checkpoint"
_SHIFTED = "diffusers' pipeline calls it {:g}"


def _split(file: str) -> str:
    return f"a diffusers folder, or ComfyUI's diffusion_models/{file}.safetensors"


ROWS: dict[str, Row] = {
    "sd15": Row("Stable Diffusion 1.5", "stable-diffusion-v1-5", 7.5, 30, 50, 32, 4, 4 * 64 * 64, 512, _CHECKPOINT, "lcm-lora-sdv1-5"),
    "sd21": Row("Stable Diffusion 2.1", "stable-diffusion-2-1-base", 7.5, 30, 50, 32, 4, 4 * 64 * 64, 512, _CHECKPOINT),
    "sdxl": Row("SDXL", "stable-diffusion-xl-base-1.0", 5.0, 35, 50, 32, 1, 4 * 128 * 128, 1024, _CHECKPOINT, "lcm-lora-sdxl"),
    "sd3-medium": Row("Stable Diffusion 3 medium", "stable-diffusion-3-medium", 4.5, 32, rank=32),
    "sd35-medium": Row("Stable Diffusion 3.5 medium", "stable-diffusion-3.5-medium", 4.5, 32, rank=32, line="sd35"),
    "sd35-large": Row("Stable Diffusion 3.5 large", "stable-diffusion-3.5-large", 4.5, 32, line="sd35"),
    "flux-dev": Row(
        "FLUX.1 dev", "FLUX.1-dev", 1.0, 33, line="flux1", guidance_note="FLUX dev's own guidance of 3.5 is inside its network"
    ),
    "flux-schnell": Row(
        "FLUX.1 schnell", "FLUX.1-schnell", 1.0, 2, 4, few=True, line="flux1", training_adapter="FLUX.1-schnell-training-adapter"
    ),
    "z-image": Row(
        "Z-Image", "Z-Image", 5.0, 36, file=_split("z_image_bf16"), guidance_note=_SHIFTED.format(4), turbo=("Z-Image-Turbo", 8)
    ),
    "z-image-turbo": Row(
        *("Z-Image-Turbo", "Z-Image-Turbo", 1.0, 6, 8),
        file=_split("z_image_turbo_bf16"),
        few=True,
        training_adapter="zimage_turbo_training_adapter_v2",
    ),
    "flux2-klein-4b": Row(
        *("FLUX.2 klein 4B base", "FLUX.2-klein-base-4B", 4.0, 37),
        latent=128 * 64 * 64,
        file=_split("flux-2-klein-base-4b"),
        turbo=("FLUX.2-klein-4B", 4),
        line="klein",
    ),
    "flux2-klein-9b": Row(
        *("FLUX.2 klein 9B base", "FLUX.2-klein-base-9B", 4.0, 37),
        latent=128 * 64 * 64,
        file=_split("flux-2-klein-base-9b"),
        turbo=("FLUX.2-klein-9B", 4),
        line="klein",
    ),
    "krea2": Row("Krea 2 Raw", "Krea-2-Raw", 4.5, 32, guidance_note=_SHIFTED.format(3.5), turbo=("Krea-2-Turbo", 8)),
    "krea2-turbo": Row("Krea 2 Turbo", "Krea-2-Turbo", 1.0, 6, 8, few=True, training_adapter="krea2_turbo_training_adapter_v1"),
    "qwen-image": Row("Qwen-Image", "Qwen-Image", 4.0, 30, file=_split("qwen_image_bf16")),
    "chroma": Row("Chroma", "Chroma1-HD", 3.0, 24),
    "anima": Row("Anima", "Anima", 4.0, 33, file=_split("anima-base-v1.0")),
}
"""By the name of a published model (`models.load.MODELS`)."""

SHORT = {"sd35": "sd35-medium", "flux": "flux-dev", "klein": "flux2-klein-4b"}
"""Names in `presets/` that stand for a published model."""


def _decoder(row: Row) -> list[Line]:
    """The decoder alone where that fits 24 GB, which is faster; `--vram` adds the rest."""
    if row.size == 512:
        return [("gradient_checkpointing_vae", "true", "takes 21 GB; on a smaller card add --vram=12, which recomputes more")]
    return everything(row)


def _range(row: Row) -> list[Line]:
    last = str(row.chain - 1)
    if row.few:
        note = "the model's own few steps, of which the last two are trained"
    elif row.steps == 50:
        note = f"40 steps, start and gradient from {row.start}: the authors' {row.start / 40:.1%}".replace(".0%", "%")
    else:
        note = f"σ at step {row.start} is about 0.4; SD1.5's 0.635 at step 30 is 0.39 in these units"
    return [("steps", str(row.chain), note), ("grad_from", str(row.start), ""), ("grad_to", last, "")]


def _refl(row: Row) -> list[Line]:
    return [*_range(row), ("threshold", "2.0", "loss max(0, 2 − reward) on the standardised reward")]


def _imagerefl(row: Row) -> list[Line]:
    return [
        *_range(row),
        ("start_from", str(row.start), ""),
        ("start_to", str(row.start), ""),
        ("refl_share", "0.25", "a quarter of the micro-batches start from noise"),
        ("diffusion_weight", "0.01", "the authors' 0.01, beside the raw reward whether or not standardise is on"),
        ("diffusion_weight_unit", '"raw"', 'in "sd" 0.3 to 0.5 with HPSv2.1 (s.d. 0.02 to 0.03), 0.1 with PickScore (about 1): estimates'),
        ("refl_diffusion", "true", "on the micro-batches from noise too"),
    ]


def _draft_k(row: Row) -> list[Line]:
    return [steps_of(row), ("k", "1", "last steps with a gradient"), guidance(row)]


def _draft_lv(row: Row) -> list[Line]:
    return [steps_of(row), ("samples", "2", "extra noise draws at the last level"), guidance(row)]


def _alignprop(row: Row) -> list[Line]:
    share = row.steps / 50
    cut: list[Line] = [
        ("cut_mean", f"{min(42 * share, row.steps - 1):.1f}", "first step with a gradient: 42 of 50 on average"),
        ("cut_std", f"{5 * share:.1f}", ""),
    ]
    return [steps_of(row), *cut, guidance(row, 5.0)]


def _drtune(row: Row) -> list[Line]:
    early = max(1, round(0.4 * row.steps))
    trained: Line = ("k", str(min(5, row.steps)), "trained steps, evenly spaced")
    return [steps_of(row), trained, ("early_stop", str(early), "the chain ends at one of so many last steps"), guidance(row)]


def _surrogate(name: str) -> Callable[[Row], list[Line]]:
    """Settings published for FLUX.1, for FLUX.2 klein, and for SD3.5, which the other models take."""

    def lines(row: Row) -> list[Line]:
        column, steps = {"flux1": 0, "klein": 1}.get(row.line, 2), min(25, row.steps)
        scale = guidance(row, 3.5) if row.line == "sd35" else guidance(row)
        found: list[Line] = [("steps", str(steps), "the model's own few steps" if row.few else ""), scale]
        for key, values in _SURROGATES[name].items():
            value = values[column]
            found.append((key, str(min(int(value), steps) if key == "k" else value), ""))
        return found

    return lines


def _lagrange(row: Row) -> list[Line]:
    lines = _surrogate("flowbp-lagrange")(row)
    if row.line == "klein":
        lines.append(("trained_from", "7", "the last 70 % of the steps"))
    elif row.line != "flux1" and not row.few:
        lines.append(("longest", "10", "most steps of the second leap"))
    return lines


def _known_noise(row: Row) -> list[Line]:
    levels: list[Line] = [("sigma_high", "0.95", "noise levels in flow units, on every family")]
    levels.append(("sigma_low", "0.75" if row.line == "flux1" else "0.7", ""))
    return [("steps", str(min(25, row.steps)), "the model's own few steps" if row.few else ""), *levels]


def _srpo(row: Row) -> list[Line]:
    return [*_known_noise(row), ("kappa_low", "-0.1", "high noise is rewarded, low noise penalised"), ("kappa_high", "0.12", "")]


def _sqdf(row: Row) -> list[Line]:
    alpha: Line = ("alpha", "0.01", "KL per latent element; the official 0.005 leaves out the ½")
    return _replayed(row, guidance(row, 5.0), "consistency" if row.consistency else "base", alpha)


def _black_box(row: Row) -> list[Line]:
    alpha: Line = ("alpha", "2.0", "KL per latent element; the official 1 leaves out the ½")
    updates: Line = ("updates_per_loop", str(40 * 64 // row.batch), "micro-batches between queries: 40 optimizer steps")
    return [*_replayed(row, guidance(row, 7.5), "base", alpha), updates]


def _replayed(row: Row, scale: Line, estimator: str, alpha: Line) -> list[Line]:
    size, rollouts = row.latent * row.steps * 2 / 1e6, 1024 if row.steps == 50 else 512
    return [
        steps_of(row),
        ("gamma", str(round(0.9 ** (50 / row.steps), 2)), "" if row.steps == 50 else "0.9 per step of a 50-step grid"),
        scale,
        ("estimator", quote(estimator), ""),
        alpha,
        ("buffer_gb", str(math.ceil(size * rollouts / 100) / 10), f"{rollouts} rollouts of {size:.1f} MB"),
    ]


def _consistency(row: Row) -> list[Line]:
    return [("consistency", quote(f"models/loras/{row.consistency}.safetensors"), "")] if row.consistency else []


def _features(row: Row) -> list[Line]:
    return [("features", '"clip-l14"', "read by the surrogate of the reward")]


def _switched(row: Row) -> list[Line]:
    share = f"{row.start / row.chain:.1%}".replace(".0%", "%")
    return [("switch", quote(share), "the base model draws until there"), guidance(row)]


_SURROGATES: dict[str, dict[str, tuple[str, ...]]] = {
    "flowbp-sparse": {"k": ("3", "4", "4"), "late_bias": ("2.0", "2.0", "1.0"), "rescale": ("1.0", "0.0", "0.5")},
    "flowbp-bridge": {
        "k": ("5", "3", "5"),
        "late_bias": ("2.0", "4.0", "4.0"),
        "rescale": ("1.0", "0.5", "0.0"),
        "alpha": ("0.1", "1.0", "0.5"),
    },
    "flowbp-lagrange": {"alpha": ("0.1",) * 3, "tau": ("0.2", "0.1", "0.2"), "rescale": ("0.5", "0.0", "0.0")},
    "leapalign": {"alpha": ("0.3",) * 3, "tau": ("0.1",) * 3},
}
"""Settings of FlowBP's configurations for FLUX.1, FLUX.2 klein and SD3.5."""


def _rewards_backward(objective: Callable[[Row], list[Line]]) -> Method:
    return Method(
        "FlowBP's settings (HPSv2.1, 64 samples a step, 300 steps) for all weights of FLUX.1, klein or SD3.5; the rate is a LoRA's",
        objective,
        steps=("steps", "300", ""),
        samples=64,
        more=(("weight_decay", "1e-4", ""), ("ema", "0.995", "")),
        every=50,
    )


_LARGE_SET = "the paper's settings for its large reward set, on SD1.5"
_DRAFT: tuple[Line, ...] = (("weight_decay", "0.1", ""),)
_FULL_FLUX = "the published settings are for FLUX and full fine-tuning; these are a LoRA's starting point"
_CLIP: tuple[Line, ...] = (("max_grad_norm", "0.1", ""),)
_SHORT_RUN: Line = ("steps", "60", "the authors stop after some twenty updates of 32")
_COSINE: Line = ("standardise", "false", "a two-tower reward's cosine: κ is a share of it")
METHODS: dict[str, Method] = {
    "refl": Method(
        "the official SD1.4 settings (ImageReward, 64 samples a step, 100 steps); the learning rate is a LoRA's",
        _refl,
        recomputed=_decoder,
        steps=("steps", "100", ""),
        samples=64,
        reward="imagereward",
        standardise=("standardise", "true", "the threshold is for the standardised score"),
        heldout="hpsv2.1",
        every=20,
        save_every=10,
    ),
    "imagerefl": Method(
        "the authors' settings for SD1.5 and SDXL",
        _imagerefl,
        recomputed=_decoder,
        watch=_switched,
        data="images",
        more=(("lr_warmup_steps", "20", ""), ("ema", "0.99", "")),
        standardise=("standardise", "false", "the raw score, as the authors'"),
    ),
    "draft-k": Method(_LARGE_SET, _draft_k, rate="2e-4", more=_DRAFT),
    "draft-lv": Method(_LARGE_SET, _draft_lv, rate="2e-4", more=_DRAFT),
    "alignprop": Method(
        "the official SD1.5 settings, but for the rank of 4",
        _alignprop,
        steps=("steps", "500", ""),
        samples=128,
        rate="1e-3",
        more=(("weight_decay", "1e-4", ""),),
        every=50,
    ),
    "drtune": Method("from memory of the paper, with DRaFT's optimizer", _drtune, rate="2e-4", more=_DRAFT),
    "flowbp-sparse": _rewards_backward(_surrogate("flowbp-sparse")),
    "flowbp-bridge": _rewards_backward(_surrogate("flowbp-bridge")),
    "flowbp-lagrange": _rewards_backward(_lagrange),
    "leapalign": _rewards_backward(_surrogate("leapalign")),
    "direct-align": Method(_FULL_FLUX, _known_noise, steps=_SHORT_RUN, more=_CLIP, every=10, save_every=10),
    "srpo": Method(_FULL_FLUX, _srpo, steps=_SHORT_RUN, more=_CLIP, standardise=_COSINE, every=10, save_every=10),
    "sqdf": Method(
        "the official SD1.5 settings for HPSv2.1",
        _sqdf,
        inputs=_consistency,
        steps=("steps", "500", ""),
        samples=64,
        rate="2e-4",
        more=(("weight_decay", "1e-4", ""),),
        standardise=("standardise", "false", "alpha is for HPS's cosine"),
        every=50,
        save_every=10,
    ),
    "sqdf-black-box": Method(
        "the official SD1.5 settings, but for the rank of 4",
        _black_box,
        inputs=_features,
        steps=("steps", "160", "four loops of 40"),
        samples=64,
        rate="1e-3",
        more=(("weight_decay", "0.1", ""), ("max_grad_norm", "5.0", "")),
        reward="aesthetic",
        standardise=("standardise", "true", "alpha is for the standardised score"),
        every=20,
        save_every=10,
    ),
    **PREFERENCES,
    **POLICY_GRADIENTS,
}
"""By the name of an objective."""
