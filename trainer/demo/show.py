"""The demo: train ReFL and ImageReFL on the embedded model, generate, judge, and write one page."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, plain
from ..data.samples import Samples, encode_images
from ..generate import Generation, generate
from ..guidance import Slot, cfg, combined
from ..lora.file import load_lora
from ..metrics.summary import Judged, area_interval, frontier_area, intervals, judge
from ..models.unet import UNetPolicy
from ..policy import Lora
from ..reward import Reward
from ..runtime.files import file_hash
from ..training.config import TrainConfig
from ..training.console import follow
from ..training.folder import CHECKPOINT
from ..training.parts import Parts
from ..training.run import Run
from . import files, world

log = logging.getLogger(__name__)

STEPS = 20  # sampler steps of the embedded world, in training and generation
# Where tuned models are trained from, and the headline k. The paper's 30 of 40 would be 15 of 20, but images of 64×64 pixels have little
# fine detail left to decide there (docs/embedded-world.md): under 15 % of what a reward sees. Here it is a quarter to a third.
START = 12
GUIDANCE = 2.0  # of the base model: 3 follows the prompt better still, and loses a tenth of the variety


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does."""

    refl_updates: int = 48
    imagerefl_updates: int = 48
    batch: int = 16
    prompts: int = 40
    per_prompt: int = 8
    switches: tuple[int, ...] = (0, 6, 9, 12, 15, 17)
    real: int = 1024


FULL = DemoSize()
QUICK = DemoSize(refl_updates=12, imagerefl_updates=12, batch=16, prompts=16, per_prompt=4, switches=(0, 12, 16), real=384)


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters of both methods (docs/results.md says how they were chosen)."""

    refl_lr: float = 1e-3
    imagerefl_lr: float = 2e-3
    rank: int = 8
    refl_share: float = 0.25
    diffusion_weight: float = 0.05


def train_config(method: str, out: Path, size: DemoSize, tuning: Tuning, seed: int) -> TrainConfig:
    """The run of one method: ReFL from noise, ImageReFL from noised renders, everything else equal."""
    shared = {"steps": STEPS, "grad_from": START, "grad_to": STEPS - 1}
    images = {"start_from": START, "start_to": START, "refl_share": tuning.refl_share, "diffusion_weight": tuning.diffusion_weight}
    return TrainConfig(
        out=str(out),
        objective={"name": method, **shared, **(images if method == "imagerefl" else {})},
        images="demo",
        lora=Lora(rank=tuning.rank, alpha=float(tuning.rank)),
        steps=size.refl_updates if method == "refl" else size.imagerefl_updates,
        batch_size=size.batch,
        learning_rate=tuning.refl_lr if method == "refl" else tuning.imagerefl_lr,
        seed=seed,
        save_every=20,
    )


def train_one(config: TrainConfig, samples: Samples, on_step: Callable[[Run], object] = lambda run: None, *, resume: bool = False) -> Path:
    """Train, or go on from a checkpoint, with a progress bar; returns the LoRA's path. Ctrl-C saves and raises KeyboardInterrupt."""
    base = file_hash(files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    parts = Parts(UNetPolicy.load(files.PIPELINE), samples, files.load_reward("proxy"), base_hash=base)
    run = Run.start(config, parts, overwrite=True, resume=resume and (Path(config.out) / CHECKPOINT).is_file())
    for _ in follow(run, f"training {config.objective['name']}"):
        on_step(run)
    if not run.last:
        raise KeyboardInterrupt(f"saved {run.checkpoint_path} after step {run.step}; go on with --resume")
    return run.result


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
        settings = Generation(steps=STEPS, guidance_scale=GUIDANCE, seed=self.seed + 1)
        images = generate(run.policy, self.prompts, settings, {"": cfg(settings.tuned())})[""]
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


class Bench:
    """The judges of the embedded world, with real renders of the test prompts as the reference of FID and LogCov."""

    def __init__(self, prompts: list[world.Caption], per_prompt: int, seed: int) -> None:
        self.texts = [c.text for c in prompts for _ in range(per_prompt)]
        self.rewards, self.features = judges(), files.load_reader().features
        with torch.no_grad():
            self.reference = torch.cat([self.features(part) for part in world.real_renders(prompts, 4 * per_prompt, seed).split(64)])

    def __call__(self, images: Tensor) -> Judged:
        """Judge images (N,3,64,64) of `texts`."""
        return judge(images, self.texts, self.rewards, self.features, self.reference)


def open_folder(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Create the demo's folder, or refuse one that is in use."""
    if out.exists() and any(out.iterdir()) and not overwrite and not resume:
        raise ConfigError(f"{out} exists: add --overwrite to replace it, or --resume to go on")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from error


def show(out: Path, *, quick: bool = False, seed: int = 0, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run the demo into `out`; returns what `results.json` holds."""
    from .report import Comparison, overview_figure, write_report

    begin = time.monotonic()
    size, tuning = (QUICK if quick else FULL), Tuning()
    open_folder(out, overwrite=overwrite, resume=resume)
    base = UNetPolicy.load(files.PIPELINE)
    samples = encode_images(base, *world.real_images(size.real, seed))
    watched = [c.text for c in world.captions(4 if quick else 8, "watch", seed) for _ in range(4)]
    configs = {m: train_config(m, out / "runs" / m, size, tuning, seed) for m in ("refl", "imagerefl")}
    tuned: dict[str, UNetPolicy] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for method, config in configs.items():
        curve, lora = Curve(judges(), watched, 10, seed, Path(config.out)), Path(config.out) / "lora.safetensors"
        if not (resume and lora.is_file()):
            train_one(config, samples, curve, resume=resume)
        (out / f"{method}.safetensors").write_bytes(lora.read_bytes())
        tuned[method], curves[method] = UNetPolicy.load(files.PIPELINE), curve.points()
        load_lora(tuned[method], lora)

    bench = Bench(world.captions(size.prompts, "test", seed), size.per_prompt, seed + 1)
    drawn = draw(base, tuned, bench.texts, size.switches, seed)
    judged = {key: bench(images) for key, images in drawn.items()}
    shown = Comparison(
        drawn={f"{name} k={k}" if name in tuned else name: images for (name, k), images in drawn.items()},
        prompts=bench.texts,
        per_prompt=size.per_prompt,
        headline=START,
        switches=size.switches,
        base=judged["base", STEPS],
        by_method={m: [judged[m, k] for k in size.switches] for m in tuned},
    )
    results: dict[str, Any] = {
        **{name: figures(judged[name, STEPS]) for name in ("base", "base_unguided")},
        "points": [{"model": m, "k": k, **figures(judged[m, k])} for m in tuned for k in size.switches],
        "frontier": {m: {a: round(frontier_area(p, shown.base, a), 4) for a in bench.rewards} for m, p in shown.by_method.items()},
        "seed": seed,
        "n": len(bench.texts),
        "ci": {
            "points": [{"model": m, "k": k, **intervals(judged[m, k], shown.base, seed)} for m in tuned for k in size.switches],
            "frontier": {m: area_interval(points, shown.base, "heldout", None, seed) for m, points in shown.by_method.items()},
            "frontier_lead": area_interval(shown.by_method["imagerefl"], shown.base, "heldout", shown.by_method["refl"], seed),
        },
        "config": {"quick": quick, "size": plain(size), "tuning": plain(tuning), "runs": {m: c.describe() for m, c in configs.items()}},
        "curves": curves,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    write_report(out / "report.html", results, shown)
    overview_figure(shown).savefig(out / "overview.png", dpi=110)
    return results


def draw(
    base: UNetPolicy, tuned: dict[str, UNetPolicy], texts: list[str], switches: tuple[int, ...], seed: int
) -> dict[tuple[str, int], Tensor]:
    """Images of the base, guided and not, and of every tuned model at every switch, by (name, k)."""
    from tqdm import tqdm

    settings = Generation(steps=STEPS, guidance_scale=GUIDANCE, seed=seed)
    with tqdm(total=len(texts) * (2 + len(tuned) * len(switches)), desc="generating", unit="image") as bar:
        mixes = {
            ("base", STEPS): cfg(settings.base),
            ("base_unguided", STEPS): cfg(Slot("base")),
            **{(name, k): combined(settings.base, settings.tuned(model=name), k) for name in tuned for k in switches},
        }
        return generate(base, texts, settings, mixes, tuned, bar.update)


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in megabytes."""
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
