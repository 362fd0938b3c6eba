"""What guidance alone gives beside models that are trained for it: other scales, CHATS's guide untrained, stronger negative models.

    python -m tools.embedded.guiding OUT DIR          # DIR: of `python -m trainer compare diffusion-npo self-npo chats`, or some of them

Test prompts, noise and judges are those of `compare`. Prints a Markdown table of gains over the guided base, with intervals over prompts.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from trainer.demo import compare, experiment, world
from trainer.guidance import Mix, Slot, cfg
from trainer.guides import CHATS
from trainer.metrics.intervals import bootstrap
from trainer.metrics.study import BASE, Point
from trainer.objectives import OBJECTIVES

SCALES = (2.5, 3.0)
STRENGTHS = (4.0,)  # of a negative model's LoRA
AXES = ("reward", "heldout", "gold", "diversity")


def controls(folders: list[Path]) -> tuple[dict[Point, Mix], dict[str, Path], dict[str, float]]:
    """Mixes by label, and the LoRAs of them with their strengths."""
    s = experiment.GUIDANCE
    mixes: dict[Point, Mix] = {(f"base at {scale:g}", 0): cfg(Slot("base", scale)) for scale in SCALES}
    mixes["CHATS's guide, untrained", 0] = CHATS().mix(Slot("base", s - 1), Slot("base"), torch.zeros(0))
    negative = [name for name in OBJECTIVES if OBJECTIVES[name]().guide == "npo"]
    found = {name: folder / "runs" / name / "lora.safetensors" for folder in folders for name in negative}
    files = {f"{name} × {x:g}": path for name, path in found.items() if path.is_file() for x in STRENGTHS}
    for label in files:
        mixes[label, 0] = OBJECTIVES[label.partition(" ")[0]]().mix(Slot(label, s), torch.zeros(0))
    return mixes, files, {label: float(label.rpartition(" ")[2]) for label in files}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description="Guidance alone, beside models trained for it")
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    a = parser.parse_args()
    torch.set_num_threads(1)
    (mixes, files, strengths), size = controls(a.folders), compare.Size()
    policy, captions = experiment.load_tuned(files, strengths), world.captions(size.prompts, "methods")
    draw = partial(experiment.evaluate, a.out, policy, mixes, captions, size.per_prompt, experiment.rewards())
    found = draw(compare.SAMPLING_SEED)
    base = found.judged[BASE].per_prompt()
    rows = {row["model"]: row for row in found.results()["points"]}
    print("| | " + " | ".join(AXES) + " | FID |\n" + "|---" * (len(AXES) + 2) + "|")
    for model, k in mixes:
        cells = [_gain(found.judged[model, k].per_prompt()[axis] - base[axis]) for axis in AXES]
        print(f"| {model} | " + " | ".join(cells) + f" | {rows[model]['fid']:.1f} |")


def _gain(differences: torch.Tensor) -> str:
    low, high = bootstrap(lambda rows: differences[rows].mean(), len(differences))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
