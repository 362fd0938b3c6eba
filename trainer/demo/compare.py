"""Methods on the embedded model under one budget of denoiser calls, on one page: on rewards, pairs, likes, or images alone.

    python -m trainer compare refl srpo sqdf --budget 12000 --out DIR --seed 0
    python -m trainer compare pairs --out DIR

A finished method is kept, an interrupted one continues from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ..config import ConfigError, likely, plain
from ..data.samples import Samples, encode_images
from ..guidance import Mix, Slot, cfg
from ..metrics.intervals import bootstrap
from ..metrics.study import Point
from ..policy import with_companions
from ..reward import Reward
from ..rewards.base import RewardModel
from ..rewards.decomposed import OMEGA
from ..training.config import TrainConfig
from ..training.folder import files_of
from . import experiment, files, page, world
from .experiment import OBJECTIVES, START, STEPS
from .pairs import captions_preferred, pairs_preferred, rated_pairs, rated_samples
from .relevant import in_units_of_the_proxy, relevant

SWITCHES = (0, START)
FEW: Point = ("few-step", 0)  # the few-step model alone
SAMPLING_SEED = 1234  # the same test noise for every training seed
PAIRS = 256  # held-out pairs
WORDS = (("crisp", "vivid", "shaded"), ("blurred", "pale", "flat"))  # control words: this world's finish, and the lack of it
# Control words that know the crowd's bias (rater.CROWD): what it sees too little of, against what it pays too much for.
BIAS = (("crisp", "shaded", "crisp"), ("vivid", "large", "black"))


Data = Literal["reward", "pairs", "labels", "good", "images"]
"""What a method learns from: a reward, with captioned renders where it takes images; pairs, likes, better images, captioned renders."""


@dataclass(frozen=True)
class Method:
    """How a method is run here: learning rate, objective settings, and about how many calls a sample costs."""

    calls: float  # per sample; for the spacing of the evaluations alone
    rate: float
    objective: dict[str, Any]
    data: Data = "reward"
    accumulation: int = 1  # micro-batches of an optimizer step
    few: bool = False  # trains and draws the few-step model, on noise levels of its own
    omega: float | None = None  # of the proxy's part that reads the prompt (LongAlign); None: the proxy itself


_PLAIN = {"guidance_scale": 1.0}
_GUIDED = {
    "guidance_scale": experiment.GUIDANCE
}  # of images: these methods train the unguided prediction, and their papers sample with guidance
_CHAIN = {**_PLAIN, "recompute": False}
_KNOWN = {**_PLAIN, "sigma_high": 0.95, "sigma_low": 0.4}  # the authors: 0.95 down to 0.4 suits most models
_ROUNDS = {**_PLAIN, "steps": 8, "group": 8, "prompts_per_round": 4}
METHODS: dict[str, Method] = {
    "refl": Method(18.5, 4e-3, OBJECTIVES["refl"]),
    "imagerefl": Method(9.8, 4e-3, OBJECTIVES["imagerefl"]),
    "refl-relevant": Method(18.5, 4e-3, {**OBJECTIVES["refl"], "name": "refl"}, omega=OMEGA),
    "draft-k": Method(36, 8e-3, {**_CHAIN, "k": STEPS - START}),
    "draft-lv": Method(28, 2e-3, _CHAIN),
    "alignprop": Method(27, 8e-3, {**_CHAIN, "cut_mean": 17.0, "cut_std": 2.0}),
    "drtune": Method(22, 4e-3, {**_CHAIN, "k": 4, "early_stop": 8}),
    # FlowBP trains every method of its tables, ReFL among them, at one rate (its configs), so here at ReFL's; the settings are FLUX.1's
    "flowbp-sparse": Method(26, 4e-3, _CHAIN),
    "flowbp-bridge": Method(30, 4e-3, _CHAIN),
    "flowbp-lagrange": Method(28, 4e-3, _CHAIN),
    "leapalign": Method(24, 4e-3, _CHAIN),
    "direct-align": Method(23, 4e-3, _KNOWN),
    "srpo": Method(23, 2e-3, {**_KNOWN, "positive": WORDS[0], "negative": WORDS[1]}),
    "srpo-bias": Method(23, 4e-3, {**_KNOWN, "name": "srpo", "positive": BIAS[0], "negative": BIAS[1]}),
    "sqdf": Method(12, 8e-3, {**_PLAIN, "estimator": "consistency", "alpha": 1.0, "buffer_gb": 0.02, "collect_every": 4}),
    # Policy gradients: rounds of 4 prompts × 8 images, one optimizer step each, as in docs/training.md
    "ddpo": Method(8, 2e-3, {**_ROUNDS, "trained_count": 4, "window": "sliding", "window_every": 1000}, accumulation=8),
    "flow-grpo": Method(8, 2e-3, {**_ROUNDS, "trained_count": 4, "noise_kind": "cps"}, accumulation=8),
    "g2rpo": Method(12, 2e-3, {**_ROUNDS, "branch_steps": 4}, accumulation=2),  # as the paper, the first half of the steps
    "awm": Method(8, 2e-3, {**_ROUNDS, "levels": 4}, accumulation=8),
    "diffusion-nft": Method(10, 2e-3, {**_ROUNDS, "steps": 5}, accumulation=8),
    # Step preferences, at 40 times the official rates, with the official gap, β and clip: one optimizer step a round
    "spo": Method(5.3, 2.4e-3, {**_PLAIN, "steps": 8, "first_step": 2, "prompts_per_round": 16}, accumulation=5),
    "pso": Method(10.7, 4e-4, {**_PLAIN, "steps": 4, "prompts_per_round": 16}, accumulation=3, few=True),
    "pso-early": Method(
        12, 4e-4, {**_PLAIN, "name": "pso", "steps": 4, "prompts_per_round": 16, "trained_count": 2}, accumulation=2, few=True
    ),
    "diffusion-dpo": Method(8, 4e-4, _GUIDED, "pairs"),
    "dspo": Method(8, 4e-4, _GUIDED, "pairs"),
    "dmpo": Method(8, 4e-4, _GUIDED, "pairs"),
    "inpo": Method(24, 4e-4, _GUIDED, "pairs"),
    "smpo": Method(30, 4e-4, {**_GUIDED, "score_range": 4.0}, "pairs"),  # of the proxy, raw, over 256 renders
    # Negative models: drawn are images of the base that they guide, with the two calls a step of its own guidance
    "diffusion-npo": Method(8, 2e-4, _GUIDED, "pairs"),
    # The winner guided by its loser, whose scale counts from 0: the same two calls a step
    "chats": Method(8, 4e-4, {"guidance_scale": experiment.GUIDANCE - 1}, "pairs"),
    "self-npo": Method(9, 4e-4, _GUIDED, "images"),
    "mapo": Method(6, 4e-4, _GUIDED, "pairs"),
    "better-images": Method(6, 4e-4, {**_GUIDED, "name": "mapo", "beta": 0.0}, "pairs"),  # MaPO without its margin: plain training
    "diffusion-kto": Method(4, 4e-4, _GUIDED, "labels"),
    "dro": Method(20, 4e-4, _GUIDED, "good"),
    "tpo": Method(8, 4e-4, _GUIDED, "images"),
}
"""Every method of the comparison. Steps are the embedded world's; training is without guidance, as in the demo.

A method that is another's with other settings gives the objective's `name` among them. Methods without a reward have 40 times the rate of
their preset for Stable Diffusion, as ReFL and ImageReFL do, and the β of their paper.
"""


def names_of(given: Sequence[str]) -> list[str]:
    """The methods that are compared: `all`, those of a kind of data, or those named."""
    found: list[str] = []
    for name in given:
        found += [one for one, method in METHODS.items() if name in ("all", method.data)] if name in ("all", *get_args(Data)) else [name]
    unknown = next((name for name in found if name not in METHODS), None)
    if unknown is not None:
        raise ConfigError(
            f"unknown method {unknown!r}: {likely(unknown, METHODS)}use some of {', '.join(METHODS)}; or all, {', '.join(get_args(Data))}"
        )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Size:
    """How much a comparison does."""

    budget: int = 12_000
    batch: int = 16
    prompts: int = 32
    per_prompt: int = 4
    watched: int = 12  # validation prompts, four images each
    points: int = 8  # evaluations over a run
    real: int = 1024


QUICK = Size(budget=1_500, batch=8, prompts=6, per_prompt=2, watched=3, real=128)


class Relative(RewardModel):
    """s⁺ − s⁻, averaged over the control words: what SRPO optimises here, without κ."""

    def __init__(self, reward: RewardModel) -> None:
        super().__init__()
        self.reward = reward

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W), B prompts -> (B,) in standard deviations of the plain score."""
        plus, minus = self.reward.scores(images, prompts, [f"{word}. " for words in WORDS for word in words]).chunk(2, dim=1)
        return (plus - minus).mean(1)


def rewards() -> dict[str, Reward]:
    """Proxy, held-out, gold, and the relative score of the proxy."""
    return {**experiment.rewards(), "relative": Relative(files.load_reward("proxy"))}


def train_config(name: str, out: Path, size: Size, seed: int, rate: float | None = None) -> TrainConfig:
    """One method's run, which the budget ends."""
    method = METHODS[name]
    every = max(1, round(size.budget / (method.calls * size.batch * method.accumulation) / size.points))
    settings = {
        "batch_size": size.batch,
        "gradient_accumulation_steps": method.accumulation,
        "seed": seed,
        "steps": 100_000,
        "budget": size.budget,
    }
    config = experiment.train_config(out, name, method.objective, rate or method.rate, every=every, watched=size.watched, **settings)
    if method.data == "pairs":
        return replace(config, images="", pairs="demo")
    return replace(config, images="", labels="demo") if method.data == "labels" else config


def samples_of(data: Data, size: Size, seed: int) -> Samples:
    """What the methods of a kind train on: `size.real` renders, in pairs or with labels where they are rated."""
    if data in ("pairs", "labels"):
        return rated_samples(experiment.load_base(), size.real // 2, seed, labelled=data == "labels")
    if data == "good":
        better, _, texts = rated_pairs(size.real // 2, seed)
        return encode_images(experiment.load_base(), better, texts)
    return experiment.renders(size.real, seed)


def check(names: Sequence[str], out: Path, size: Size, seed: int) -> None:
    """ConfigError where nothing could come of a comparison, before it renders or trains anything."""
    if seed < 0:
        raise ConfigError(f"--seed {seed}: give 0 or more")
    calls = {name: round(METHODS[name].calls * size.batch * METHODS[name].accumulation) for name in names_of(names)}
    dearest = max(calls, key=lambda name: calls[name])
    if size.budget < calls[dearest]:
        raise ConfigError(f"--budget {size.budget}: a step of {dearest} takes about {calls[dearest]} denoiser calls: give at least that")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "runs").is_dir():
        raise ConfigError(f"--out {out} holds something else than a comparison: give another folder")
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from error


def compare(names: Sequence[str], out: Path, size: Size, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """Train and evaluate every method into `out`; returns what `results.json` holds (the demo's keys, and `cost`)."""
    names = names_of(names)
    begin, configs = time.monotonic(), {name: train_config(name, out / "runs" / name, size, seed) for name in names}
    for name in names:
        if (omega := METHODS[name].omega) is not None:
            configs[name] = replace(configs[name], reward=relevant(out, omega))
    for config in configs.values():
        experiment.evaluations(config)  # before any is trained: raises where a finished one had other settings
    kinds: list[Data] = list(dict.fromkeys(METHODS[name].data for name in names))
    samples = {data: samples_of(data, size, seed) for data in kinds}
    watched = [c.text for c in world.captions(size.watched, "validation")]
    judges = rewards()
    curves = {
        name: experiment.train(config, samples[METHODS[name].data], watched, judges, reward=_trained_on(config), few=METHODS[name].few)
        for name, config in configs.items()
    }
    loras = {name: path for config in configs.values() for name, path in _loras(config).items()}
    captions, policy = world.captions(size.prompts, "methods"), experiment.load_tuned(loras)
    few = experiment.load_few(loras) if any(METHODS[name].few for name in names) else None
    mixes, grids = dict[Point, Mix](), dict[Point, Tensor]()
    for name, config in configs.items():
        adapters, drawn = [name, f"{name} best"], partial(config.method.mix, sigmas=policy.sigmas(STEPS))
        if few and METHODS[name].few:
            drawn, mixes[FEW] = _of_few, _of_few(Slot("base"))
            grids |= {point: few.sigmas(config.method.steps) for point in (FEW, *((adapter, 0) for adapter in adapters))}
        mixes |= experiment.switched(adapters, SWITCHES, config.method.guidance_scale, drawn)
    evaluated = experiment.evaluate(out, policy, mixes, captions, size.per_prompt, judges, SAMPLING_SEED, few=few, grids=grids)
    results = evaluated.results() | {
        "seed": seed,
        "config": {"quick": quick, "size": plain(size), "held_out_pairs": PAIRS, "methods": {name: plain(METHODS[name]) for name in names}},
        "curves": curves,
        "cost": {name: _cost(out / "runs" / name) for name in names},
        "pairs": _shares(pairs_preferred(policy, list(loras), PAIRS)) if samples.keys() & {"pairs", "labels", "good"} else {},
        "captions": _shares(captions_preferred(policy, list(loras), PAIRS)) if "images" in samples else {},
        "seconds": round(time.monotonic() - begin, 1),
    }
    summary = (
        f"Every method was trained with {size.budget} denoiser calls: a forward of one image is one, a backward through it two more, "
        "conditional and unconditional apart. “best” is the checkpoint with the highest held-out reward on validation prompts."
    )
    heading = "Reward-gradient methods" if list(samples) == ["reward"] else "Methods"
    page.write_comparison(out, results, evaluated, f"{heading} under one budget", summary)
    return results


def _of_few(slot: Slot) -> Mix:
    """The few-step model with an adapter."""
    return cfg(replace(slot, model="few"))


def _loras(config: TrainConfig) -> dict[str, Path]:
    """The last and the best LoRA of a finished run and their companions, by the names of their adapters."""
    folder, companions = Path(config.out), config.method.companions
    both = ((folder.name, "lora.safetensors"), (f"{folder.name} best", "best.safetensors"))
    return {
        adapter: path
        for name, file in both
        for adapter, path in zip(with_companions(name, companions), files_of(folder / file, companions).values())
    }


def _trained_on(config: TrainConfig) -> Reward | None:
    """The reward of a run that is not trained on the proxy itself."""
    return in_units_of_the_proxy(config.reward) if config.reward.startswith("relevant@") else None


def _shares(preferred: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The share of held-out pairs on whose better side each adapter agrees, with a 95 % interval over pairs."""
    found: dict[str, dict[str, float]] = {}
    for name, agrees in preferred.items():
        low, high = bootstrap(lambda rows, agrees=agrees: agrees[rows].mean(), PAIRS)
        found[name] = {"mean": float(agrees.mean()), "low": float(low), "high": float(high)}
    return found


def _cost(folder: Path) -> dict[str, float]:
    """Steps, calls, of them those without a gradient, decoded images, and the last eighth's mean KL where a method reports one."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    last = lines[-max(1, len(lines) // 8) :]
    kl = [line["kl"] for line in last if "kl" in line]
    spent = {name: lines[-1].get(name, 0) for name in ("calls", "calls_without_gradient", "images_decoded")}
    return {"steps": lines[-1]["step"], **spent, **({"kl": sum(kl) / len(kl)} if kl else {})}
