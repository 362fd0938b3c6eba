"""The experiment that decides the claim, as docs/results.md fixes it: ReFL and ImageReFL trained to saturation, alone and combined.

    python -m tools.embedded.claim seed FOLDER SEED OUT.json           # trains and judges one training seed
    python -m tools.embedded.claim controls FOLDER SEED OUT.json       # the old diffusion weight, and a reward that cannot be hacked

Interrupted, each continues: trainings from their checkpoint, judging from the last finished chunk of prompts. Test prompts and test
noise are the same for every training seed and arm.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.demo import experiment, files, world
from trainer.demo.compare import SAMPLING_SEED
from trainer.demo.experiment import IMAGEREFL, LATE, STEPS, UNGUIDED, generation, load_tuned
from trainer.demo.rater import Gold
from trainer.generate import generate
from trainer.guidance import Mix, Slot, cfg, combined
from trainer.lora.file import save_lora
from trainer.metrics.study import BASE, Point, Study
from trainer.reward import Reward
from trainer.rewards.weighted import Standardised
from trainer.runtime.files import file_hash, write_text
from trainer.training.folder import WATCH
from trainer.training.run import Run

log = logging.getLogger(__name__)

RATE = 4e-3  # of every arm
BATCH = 16
UPDATES = 60
CHECKPOINTS = (15, 30, 60)
SWITCHES = (0, 6, 9, 12, 15, 17)
FEW_SWITCHES = (0, 12, 15)  # of the earlier checkpoints
STRENGTHS = (0.25, 0.5, 0.75)
EQUAL_CALLS = 113  # ImageReFL's updates for the denoiser calls of ReFL's 60: 18.5 calls per sample against 9.8
PROMPTS, PER_PROMPT = 100, 4
CHUNK = 40  # images that are judged before they are written down
REAL = 1024


@dataclass(frozen=True)
class Arm:
    """One training: objective, its settings, updates, kept checkpoints, and whether the rater itself is the reward."""

    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    updates: int = UPDATES
    checkpoints: tuple[int, ...] = CHECKPOINTS
    unhackable: bool = False


ARMS = {
    "refl": Arm("refl", LATE),
    "refl+diffusion": Arm("imagerefl", {**IMAGEREFL, "refl_share": 1.0}),
    "imagerefl": Arm("imagerefl", IMAGEREFL, EQUAL_CALLS, (*CHECKPOINTS, EQUAL_CALLS)),
}
CONTROLS = {
    "imagerefl, old weight": Arm("imagerefl", {**IMAGEREFL, "diffusion_weight": 0.05}, checkpoints=(UPDATES,)),
    "refl on the rater": Arm("refl", LATE, checkpoints=(UPDATES,), unhackable=True),
    "imagerefl on the rater": Arm("imagerefl", IMAGEREFL, checkpoints=(UPDATES,), unhackable=True),
}


class DifferentiableRater(Gold):
    """The rater's utility with its gradient: a reward that cannot be hacked, since it is what it is judged by."""

    differentiable = True

    def forward(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        """images (B,3,64,64) in [0,1], B prompts -> (B,) float32."""
        return self.utility(images, prompts)


def reward_of(arm: Arm) -> Reward:
    """What an arm trains on: the proxy in standard deviations, or the rater in its own within-prompt ones."""
    return Standardised(DifferentiableRater(files.load_reader()), 0.0, 1.0) if arm.unhackable else files.load_reward("proxy")


def train(folder: Path, name: str, arm: Arm, seed: int) -> dict[int, Path]:
    """Train one arm, or continue it; returns the LoRA of each kept checkpoint."""
    kept = {step: folder / name / f"{step:04d}.safetensors" for step in arm.checkpoints}
    samples = experiment.renders(REAL, seed)
    watched = [c.text for c in world.captions(8, "validation")]
    settings = {"batch_size": BATCH, "seed": seed, "steps": arm.updates}
    config = experiment.train_config(folder / name, arm.objective, arm.settings, RATE, every=15, watched=8, **settings)

    def keep(run: Run) -> None:
        if run.step in kept:
            save_lora(run.policy, kept[run.step], run.metadata())

    experiment.train(config, samples, watched, experiment.rewards(), keep, reward=reward_of(arm))
    return kept


def mixes_of(arms: Mapping[str, Arm]) -> dict[Point, Mix]:
    """Every point that is judged: the last checkpoint at all switches, earlier ones at few."""
    settings, found = generation(0), dict[Point, Mix]()
    for name, arm in arms.items():
        for step in arm.checkpoints:
            switches = SWITCHES if step >= UPDATES else FEW_SWITCHES
            found |= {(f"{name} {step}", k): combined(settings.base, settings.tuned(f"{name} {step}"), k) for k in switches}
    return found


def judge(folder: Path, loras: Mapping[str, Path], mixes: Mapping[Point, Mix], strengths: Mapping[str, float]) -> dict[str, Any]:
    """Figures per prompt of every point on the test prompts, continuing where an earlier call stopped."""
    captions = world.captions(PROMPTS, "claim")
    prompts = [c.text for c in captions for _ in range(PER_PROMPT)]
    settings = generation(SAMPLING_SEED)
    every = {BASE: cfg(settings.base), UNGUIDED: cfg(Slot("base")), **mixes}
    policy = load_tuned(loras, strengths)
    hashes = {name: file_hash(path) for name, path in loras.items()}
    study = Study(folder / "scores", prompts, list(every)[1:], experiment.judges(experiment.rewards()), {"loras": hashes, **weights()})
    study.open(resume=True, overwrite=False)
    for part in study.parts(CHUNK):
        study.add(part, generate(policy, part.prompts, settings, every, first=part.first))
        log.info("judged chunk %d, %d of %d images", part.number, part.first + len(part.prompts), len(prompts))
    real = world.real_renders(captions, 4 * PER_PROMPT, 1)
    summary = study.summarise({name: map(features, real.split(64)) for name, features in study.judges.features.items()})
    figures = {BASE: summary["base"], **{(p["model"], p["k"]): p for p in summary["points"]}}
    rows: dict[str, Any] = {}
    for point in study.points:
        per_prompt = study.judged(point).per_prompt()
        kept = {a: [round(x, 4) for x in values.tolist()] for a, values in per_prompt.items() if "vendi" not in a}
        whole = {name: round(float(value), 4) for name, value in figures[point].items() if name.endswith(("fid", "logcov"))}
        rows[f"{point[0]}|{point[1]}"] = {**kept, **whole}
    return rows


def weights() -> dict[str, str]:
    """Hashes of the judges and the model, so that records of other weights are not mixed."""
    return {name: file_hash(files.FOLDER / name) for name in files.HASHED}


def run(folder: Path, arms: Mapping[str, Arm], seed: int, strengths: Iterable[float]) -> dict[str, Any]:
    """Train and judge some arms of one training seed."""
    loras: dict[str, Path] = {}
    for name, arm in arms.items():
        loras |= {f"{name} {step}": path for step, path in train(folder, name, arm, seed).items()}
    mixes = mixes_of(arms)
    weaker = {f"refl {UPDATES} at {100 * s:.0f} %": s for s in strengths}
    loras |= dict.fromkeys(weaker, loras[f"refl {UPDATES}"]) if weaker else {}
    mixes |= {(name, 0): cfg(generation(0).tuned(name)) for name in weaker}
    curves = {name: json.loads((folder / name / WATCH).read_text("utf-8")) for name in arms}
    rows = judge(folder, loras, mixes, weaker)
    described = {name: {**vars(arm), "settings": dict(arm.settings)} for name, arm in arms.items()}
    protocol = {"rate": RATE, "batch": BATCH, "prompts": PROMPTS, "per_prompt": PER_PROMPT, "steps": STEPS, "arms": described}
    return {"seed": seed, "protocol": protocol, "weights": weights(), "curves": curves, "points": rows}


def main() -> None:
    """Run one of the commands."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="The experiment of docs/results.md")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("seed", "controls"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("seed", type=int)
        command.add_argument("out", type=Path)
        command.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    arms, strengths = (ARMS, STRENGTHS) if a.command == "seed" else (CONTROLS, ())
    result = run(a.folder / f"{a.command}{a.seed}", arms, a.seed, strengths)
    write_text(json.dumps(result) + "\n", a.out)


if __name__ == "__main__":
    main()
