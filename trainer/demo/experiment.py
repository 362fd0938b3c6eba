"""What the demo and the comparison share: the sampler's settings, training on renders, and evaluation against renders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.samples import Samples, encode_images
from ..generate import Generation, generate
from ..guidance import Mix, Slot, after, cfg
from ..lora.file import load_consistency, load_lora, load_training_adapter, read_metadata
from ..metrics.study import BASE, Judges, Point, Study
from ..metrics.summary import Judged
from ..models.unet import UNetPolicy
from ..policy import Lora
from ..reward import Reward
from ..runtime.device import peak_gb
from ..runtime.files import check_weights, file_hash
from ..training.config import TrainConfig, Watch
from ..training.console import follow
from ..training.evaluation import Evaluation
from ..training.folder import CHECKPOINT, WATCH, check_finished
from ..training.parts import Parts, weights_of
from ..training.run import Run
from . import files, world
from .rater import shows_content

STEPS = 20  # sampler steps of the embedded world, in training and generation
# Where training starts from images, and the headline k. The paper's 30 of 40 would be 15 of 20, but images of 64×64 pixels have little
# fine detail left to decide there (docs/embedded-world.md): under 15 % of what a reward sees. Here it is a quarter to a third.
START = 12
GUIDANCE = 2.0  # of the base model: 3 follows the prompt better still, and loses a tenth of the variety

LATE: dict[str, Any] = {"grad_from": START, "grad_to": STEPS - 1}
IMAGEREFL: dict[str, Any] = {
    **LATE,
    "start_from": START,
    "start_to": START,
    "refl_share": 0.25,
    "refl_diffusion": True,
    "diffusion_weight": 0.3,
    "diffusion_weight_unit": "sd",
}
OBJECTIVES: dict[str, dict[str, Any]] = {"refl": LATE, "imagerefl": IMAGEREFL}
"""The two methods of the paper in the embedded world's steps; docs/results.md says how the weights were chosen."""

UNET = files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors"
UNGUIDED: Point = ("base_unguided", STEPS)


def rewards() -> dict[str, Reward]:
    """The reward of training (`reward`), the held-out one and the gold one, as results name them."""
    return {"reward": files.load_reward("proxy"), "heldout": files.load_reward("heldout"), "gold": files.load_reward("gold")}


def judges(rewards: Mapping[str, Reward]) -> Judges:
    """What an evaluation measures: rewards, diversity and distances under both extractors, and whether an image is right."""
    reader = files.load_reader()

    def match(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return shows_content({name: logits.softmax(1) for name, logits in reader(images).items()}, prompts)

    return Judges(rewards, {"content": files.load_extractor().features, "reader": reader.features}, match=match)


def hashes() -> dict[str, str]:
    """SHA-256 of every file that figures of the embedded world depend on."""
    return {name: file_hash(files.FOLDER / name) for name in files.HASHED}


def load_base() -> UNetPolicy:
    """The embedded model."""
    files.check_pipeline()
    return UNetPolicy.load(files.PIPELINE)


def load_tuned(loras: Mapping[str, Path], strengths: Mapping[str, float] | None = None) -> UNetPolicy:
    """The embedded model with a LoRA under each name."""
    policy = load_base()
    for name, path in loras.items():
        load_lora(policy, path, (strengths or {}).get(name, 1.0), adapter=name)
    return policy


def load_few(loras: Mapping[str, Path]) -> UNetPolicy:
    """The embedded few-step model, which is the base with its consistency LoRA, and a LoRA under each name."""
    policy = load_tuned(loras)
    load_training_adapter(policy, files.CONSISTENCY)  # beside every adapter, `base` among them
    return policy


def renders(n: int, seed: int) -> Samples:
    """`n` encoded renders with captions to train on."""
    return encode_images(load_base(), *world.real_images(n, seed))


def train_config(
    out: Path, name: str, objective: Mapping[str, Any], rate: float, *, every: int, watched: int, **settings: Any
) -> TrainConfig:
    """The run of one method, evaluated and saved every `every` steps on four images of each of `watched` prompts.

    settings: `batch_size`, `seed`, `steps` and `budget` of the config.
    """
    return TrainConfig(
        out=str(out),
        objective={"name": name, "steps": STEPS, **objective},
        images="demo",
        consistency="demo" if objective.get("estimator") == "consistency" else "",
        lora=Lora(rank=8, alpha=8.0),
        learning_rate=rate,
        save_every=every,
        watch=Watch(every=every, heldout="demo-heldout", count=watched, images=4, guidance_scale=GUIDANCE),
        **settings,
    )


def train(
    config: TrainConfig,
    samples: Samples,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    on_step: Callable[[Run], object] = lambda run: None,
    *,
    resume: bool = True,
    reward: Reward | None = None,
    few: bool = False,
) -> list[dict[str, float]]:
    """Train, with a progress bar; returns the evaluations. With `resume` a finished run is kept and an interrupted one continues.

    ConfigError where that run had other settings or weights. Ctrl-C saves the checkpoint and raises KeyboardInterrupt. reward: what is
    trained on, the proxy by default. few: the few-step model is trained, not the base.
    """
    folder = Path(config.out)
    finished = evaluations(config) if resume else None
    if finished is not None:
        return finished
    weights, policy = weights_of(config), load_few({}) if few else load_base()
    if config.consistency:
        load_consistency(policy, files.CONSISTENCY)
    evaluation = Evaluation.of_run(config, policy, rewards, prompts, files.load_extractor().features)
    parts = Parts(policy, samples, reward or files.load_reward("proxy"), evaluation=evaluation, base_hash=file_hash(UNET), weights=weights)
    run = Run.start(config, parts, overwrite=True, resume=resume and (folder / CHECKPOINT).is_file())
    for _ in follow(run):
        on_step(run)
    if not run.last:
        raise KeyboardInterrupt(f"saved {run.checkpoint_path} after step {run.step}; the same command continues, the demo with --resume")
    return evaluation.points


def evaluations(config: TrainConfig) -> list[dict[str, float]] | None:
    """The evaluations of a finished run, None of another; ConfigError where the finished one had other settings or weights."""
    folder = Path(config.out)
    if not (folder / "lora.safetensors").is_file() or not (folder / WATCH).is_file():
        return None
    _check_finished(config, folder / "lora.safetensors", weights_of(config))
    return json.loads((folder / WATCH).read_text("utf-8"))


def _check_finished(config: TrainConfig, lora: Path, weights: Mapping[str, Mapping[str, str]]) -> None:
    """ValueError where a finished run was trained with other settings, or with other weights than those that it would be compared by."""
    made = read_metadata(lora)
    check_finished(config, made["settings"])
    hashes: dict[str, dict[str, str]] | None = made.get("weights")
    then = None if hashes is None else {"the model": made.get("base", ""), **hashes.get("reward", {}), **hashes.get("watch.heldout", {})}
    now = {"the model": file_hash(UNET), **weights["reward"], **weights["watch.heldout"]}
    check_weights(lora, then, now, "give another --out; the earlier reward stays loadable by its folder: `train --reward=PATH`")


@dataclass(frozen=True)
class Evaluated:
    """Images (N,3,64,64) of every model and switch, their figures per prompt, and the summary of the study."""

    prompts: list[str]
    images: dict[Point, Tensor]
    judged: dict[Point, Judged]
    summary: dict[str, Any]

    def results(self) -> dict[str, Any]:
        """What every `results.json` of the embedded world holds."""
        tuned = [p for p in self.summary["points"] if p["model"] != UNGUIDED[0]]
        unguided = next(p for p in self.summary["points"] if p["model"] == UNGUIDED[0])
        return {
            "base": self.summary["base"],
            "base_unguided": {name: value for name, value in unguided.items() if name not in ("model", "k")},
            "points": tuned,
            "frontier": {m: areas for m, areas in self.summary["frontier"].items() if m != UNGUIDED[0]},
            "n": len(self.prompts),
            "ci": {"points": [row for row in self.summary["ci"] if row["model"] != UNGUIDED[0]]},
            "per_prompt": {f"{m}|{k}": {a: v.tolist() for a, v in j.per_prompt().items()} for (m, k), j in self.judged.items()},
            "weights": hashes(),
            "peak_rss_mb": round(1000 * peak_gb("cpu"), 1),
        }


@torch.no_grad()
def evaluate(
    folder: Path,
    policy: UNetPolicy,
    mixes: Mapping[Point, Mix],
    captions: Sequence[world.Caption],
    per_prompt: int,
    rewards: Mapping[str, Reward],
    seed: int,
    renders_seed: int = 1,
    few: UNetPolicy | None = None,
    grids: Mapping[Point, Tensor] | None = None,
) -> Evaluated:
    """Generate by the guided base, the unguided base and `mixes`, and judge; FID and LogCov are against renders of the same prompts.

    `diversity` is of content, among images that show the content that their prompt names; `reader_diversity` is of all
    attributes, the finish included, whatever an image shows. few: the few-step model, by its name in slots, `few`; grids: noise levels
    of mixes that have their own.
    """
    from tqdm import tqdm

    prompts = [c.text for c in captions for _ in range(per_prompt)]
    settings = generation(seed)
    mixes = {BASE: cfg(settings.base), UNGUIDED: cfg(Slot("base")), **mixes}
    with tqdm(total=len(prompts) * len(mixes), desc="generating", unit="image") as bar:
        images = generate(policy, prompts, settings, mixes, {"few": few} if few else {}, progress=bar.update, grids=grids)
    study = Study(folder / "scores", prompts, list(mixes)[1:], judges(rewards), {})
    study.open(resume=False, overwrite=True)
    for part in study.parts(len(prompts)):
        study.add(part, images)
    real = world.real_renders(captions, 4 * per_prompt, renders_seed)
    summary = study.summarise({name: map(features, real.split(64)) for name, features in study.judges.features.items()})
    judged = {point: study.judged(point) for point in study.points}
    study.clear()
    return Evaluated(prompts, images, judged, summary)


def generation(seed: int) -> Generation:
    """The embedded world's sampler."""
    return Generation(steps=STEPS, guidance_scale=GUIDANCE, seed=seed)


def switched(
    adapters: Iterable[str], switches: Sequence[int], guidance_scale: float = 1.0, drawn: Callable[[Slot], Mix] = cfg
) -> dict[Point, Mix]:
    """Combined generation: the guided base up to step k, then the tuned model as it is `drawn`; k = 0 is that model alone.

    guidance_scale: of the tuned model.
    """
    return {(name, k): after(generation(0).base, drawn(Slot(name, guidance_scale)), k) for name in adapters for k in switches}
