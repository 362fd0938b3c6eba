"""The demo: train ReFL and ImageReFL on the embedded model, generate, judge, and write one page."""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, plain
from ..data import Samples, encode_images
from ..draws import generator, seed_of
from ..generate import Generation, generate, generate_base
from ..lora_file import load_lora
from ..metrics.evaluate import Judged, area_interval, frontier_area, intervals, judge
from ..policies.unet import Lora, UNetPolicy
from ..reward import Reward
from ..run import Run, TrainConfig, file_hash, interruptible
from . import files, world

log = logging.getLogger(__name__)

STEPS = 20  # sampler steps of the embedded world, in training and generation
START = 15  # the same noise level as 30 of 40: where tuned models are trained from, and the headline k
GUIDANCE = 3.0  # of the base model


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does."""

    refl_updates: int = 50
    imagerefl_updates: int = 100
    batch: int = 32
    prompts: int = 40
    per_prompt: int = 8
    switches: tuple[int, ...] = (0, 10, 12, 15, 17, 18)
    real: int = 1024


FULL = DemoSize()
QUICK = DemoSize(refl_updates=12, imagerefl_updates=20, batch=16, prompts=16, per_prompt=4, switches=(0, 15, 18), real=384)


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters that both methods share, chosen on another seed (docs/results.md)."""

    lr: float = 1e-3
    rank: int = 8
    refl_share: float = 0.25
    diffusion_weight: float = 0.05
    extra: dict[str, Any] = field(default_factory=dict)


def captions(n: int, *purpose: int | str) -> list[world.Caption]:
    """`n` different captions of the training law."""
    rng = random.Random(seed_of("captions", *purpose))
    found: dict[str, world.Caption] = {}
    while len(found) < n:
        scene = [rng.randrange(len(values)) for values in world.ATTRIBUTES.values()]
        caption = world.draw_caption(scene, rng)
        found[caption.text] = caption
    return list(found.values())


def real_images(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """`n` renders (n,3,64,64) with a caption each: the demo's data set."""
    attributes, jitter = world.draw_scenes(n, generator(seed, "real images"))
    rng = random.Random(seed_of(seed, "real captions"))
    return world.render(attributes, jitter), [world.draw_caption(s, rng).text for s in attributes.tolist()]


def real_renders(prompts: list[world.Caption], per_prompt: int, seed: int) -> Tensor:
    """Renders (P·n,3,64,64) of what each prompt leaves open, drawn from the world's law."""
    parts = [world.render(*world.completions(c, per_prompt, generator(seed, "renders", i))) for i, c in enumerate(prompts)]
    return torch.cat(parts)


def train_config(method: str, out: Path, size: DemoSize, tuning: Tuning, seed: int) -> TrainConfig:
    """The run of one method: ReFL from noise, ImageReFL from noised renders, everything else equal."""
    shared = {"steps": STEPS, "grad_from": START, "grad_to": STEPS - 1, **tuning.extra}
    images = {"start_from": START, "start_to": START, "refl_share": tuning.refl_share, "diffusion_weight": tuning.diffusion_weight}
    return TrainConfig(
        out=str(out),
        objective={"name": method, **shared, **(images if method == "imagerefl" else {})},
        images="demo",
        lora=Lora(rank=tuning.rank, alpha=float(tuning.rank)),
        steps=size.refl_updates if method == "refl" else size.imagerefl_updates,
        batch=size.batch,
        lr=tuning.lr,
        seed=seed,
        save_every=20,
    )


def train_one(config: TrainConfig, samples: Samples, on_step: Callable[[Run], object] = lambda run: None, *, resume: bool = False) -> Path:
    """Train, showing progress, or go on from a checkpoint; returns the LoRA's path. Ctrl-C saves and raises KeyboardInterrupt."""
    from tqdm import tqdm

    policy = UNetPolicy.load(files.PIPELINE)
    reward = files.load_reward("proxy")
    run = Run(config, policy, samples, reward, file_hash(files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors"))
    run.open_folder(overwrite=True, resume=resume and run.checkpoint_path.is_file())
    name = config.objective["name"]
    with interruptible() as stopping, tqdm(total=config.steps, initial=run.step, desc=f"training {name}", unit="step") as bar:
        for done in run.steps():
            bar.set_postfix(reward=f"{done.logs['reward']:.2f}")
            bar.update()
            on_step(run)
            if stopping():
                run.save()
                raise KeyboardInterrupt(f"saved {run.checkpoint_path} after step {done.number}; go on with --resume")
    return Path(config.out) / "lora.safetensors"


class Curve:
    """Proxy, held-out, gold and diversity of the model under training, on a few prompts, every `every` steps.

    The points lie in the run's folder beside its log, so that a resumed run has them all.
    """

    def __init__(self, judges: dict[str, Reward], prompts: list[str], every: int, seed: int, folder: Path) -> None:
        self.judges, self.prompts, self.every, self.seed = judges, prompts, every, seed
        self.path = folder / "curve.json"
        self.features = files.load_reader().features

    def __call__(self, run: Run) -> None:
        """Judge if it is time."""
        if run.step % self.every and run.step != 1:
            return
        settings = Generation(steps=STEPS, guidance=GUIDANCE, seed=self.seed + 1)
        images = generate(run.policy, {"tuned": run.policy}, self.prompts, [0], settings)["tuned", 0]
        judged = judge(images, self.prompts, self.judges, self.features, self.features(images))
        point = {"step": float(run.step), **{k: v for k, v in judged.means().items() if k not in ("fid", "logcov")}}
        earlier = [p for p in self.points() if p["step"] < run.step] if run.step > 1 else []
        self.path.write_text(json.dumps([*earlier, point]), "utf-8")

    def points(self) -> list[dict[str, float]]:
        """What has been measured so far."""
        return json.loads(self.path.read_text("utf-8")) if self.path.is_file() else []


def judges() -> dict[str, Reward]:
    """The three rewards by the names that results use."""
    return {"reward": files.load_reward("proxy"), "heldout": files.load_reward("heldout"), "gold": files.load_reward("gold")}


def figures(judged: Judged) -> dict[str, float]:
    """One model's row of `results.json`."""
    return {name: round(value, 5) for name, value in judged.means().items()}


def show(out: Path, *, quick: bool = False, seed: int = 0, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run the demo into `out`; returns what `results.json` holds."""
    from tqdm import tqdm

    from ..metrics.report import overview_figure, write_report

    begin = time.monotonic()
    size, tuning = (QUICK if quick else FULL), Tuning()
    if out.exists() and any(out.iterdir()) and not overwrite and not resume:
        raise ConfigError(f"{out} exists: add --overwrite to replace it, or --resume to go on")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from error

    base = UNetPolicy.load(files.PIPELINE)
    images, image_captions = real_images(size.real, seed)
    samples = encode_images(base, images, image_captions)
    watched = [c.text for c in captions(4 if quick else 8, "watch", seed) for _ in range(4)]
    curves: dict[str, list[dict[str, float]]] = {}
    tuned: dict[str, Any] = {}
    configs: dict[str, TrainConfig] = {}
    for method in ("refl", "imagerefl"):
        config = configs[method] = train_config(method, out / "runs" / method, size, tuning, seed)
        curve = Curve(judges(), watched, 10, seed, Path(config.out))
        finished = resume and (Path(config.out) / "lora.safetensors").is_file()
        lora = Path(config.out) / "lora.safetensors" if finished else train_one(config, samples, curve, resume=resume)
        (out / f"{method}.safetensors").write_bytes(lora.read_bytes())
        policy = UNetPolicy.load(files.PIPELINE)
        load_lora(policy, out / f"{method}.safetensors")
        tuned[method], curves[method] = policy, curve.points()

    prompts = captions(size.prompts, "test", seed)
    texts = [c.text for c in prompts for _ in range(size.per_prompt)]
    settings = Generation(steps=STEPS, guidance=GUIDANCE, seed=seed)
    total = len(texts) * (2 + 2 * len(size.switches))
    with tqdm(total=total, desc="generating", unit="image") as bar:
        base_images = generate_base(base, texts, settings, bar.update)
        unguided = generate_base(base, texts, Generation(steps=STEPS, guidance=1.0, seed=seed), bar.update)
        drawn = generate(base, tuned, texts, size.switches, settings, bar.update)
    reader, scorers = files.load_reader(), judges()
    with torch.no_grad():
        reference = torch.cat([reader.features(r) for r in real_renders(prompts, 4 * size.per_prompt, seed + 1).split(64)])
    judged = {key: judge(pictures, texts, scorers, reader.features, reference) for key, pictures in drawn.items()}
    at_base, at_unguided = (judge(p, texts, scorers, reader.features, reference) for p in (base_images, unguided))

    by_method = {m: [judged[m, k] for k in size.switches] for m in tuned}
    results: dict[str, Any] = {
        "base": figures(at_base),
        "base_unguided": figures(at_unguided),
        "points": [{"model": m, "k": k, **figures(j)} for (m, k), j in judged.items()],
        "frontier": {m: {axis: round(frontier_area(points, at_base, axis), 4) for axis in scorers} for m, points in by_method.items()},
        "seed": seed,
        "n": len(texts),
        "ci": {
            "points": [{"model": m, "k": k, **intervals(j, at_base, seed)} for (m, k), j in judged.items()],
            "frontier": {m: area_interval(points, at_base, "heldout", None, seed) for m, points in by_method.items()},
            "frontier_lead": area_interval(by_method["imagerefl"], at_base, "heldout", by_method["refl"], seed),
        },
        "config": {
            "quick": quick,
            "size": plain(size),
            "tuning": asdict(tuning),
            "runs": {m: plain(c.describe()) for m, c in configs.items()},
        },
        "curves": curves,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    pictures = {"base": base_images, "base_unguided": unguided, **{f"{m} k={k}": p for (m, k), p in drawn.items()}}
    write_report(out / "report.html", results, pictures, texts, size.per_prompt, START, at_base, by_method, size.switches)
    overview_figure(pictures, texts, size.per_prompt, START, at_base, by_method, size.switches).savefig(out / "overview.png", dpi=110)
    return results


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in megabytes."""
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
