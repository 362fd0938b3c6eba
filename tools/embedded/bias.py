"""Whether a method follows the crowd's bias: the rater's parts of images, measured from pixels, in differences to the base.

    python -m tools.embedded.bias DIR0 [DIR1 …] [--methods refl direct-align srpo srpo-bias]

A folder is one of `python -m trainer compare`. The crowd, whose choices made the proxy, pays more than the rater for vivid, centred, large
and dark, and less for crisp and for the lack of artefacts. Prints a Markdown table, one figure per folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from trainer.demo import compare, experiment, world
from trainer.demo.rater import CROWD, WEIGHTS, measure
from trainer.generate import generate
from trainer.guidance import Mix, cfg
from trainer.metrics.study import BASE

PARTS = [name for name in WEIGHTS if name != "match"]


@torch.no_grad()
def parts(folder: Path, methods: list[str], prompts: int, per_prompt: int) -> dict[str, dict[str, float]]:
    """Mean parts of the tuned models' images by method, minus the base's."""
    policy = experiment.load_tuned({name: folder / "runs" / name / "lora.safetensors" for name in methods})
    settings = experiment.generation(compare.SAMPLING_SEED)
    texts = [c.text for c in world.captions(prompts, "methods") for _ in range(per_prompt)]
    mixes: dict[str, Mix] = {BASE[0]: cfg(settings.base), **{name: cfg(settings.tuned(name)) for name in methods}}
    found = {
        name: {part: float(v.mean()) for part, v in measure(images).items()}
        for name, images in generate(policy, texts, settings, mixes).items()
    }
    base = found.pop(BASE[0])
    return {name: {part: values[part] - base[part] for part in PARTS} for name, values in found.items()}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description="Parts of the rater's utility, by method")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", default=["refl", "direct-align", "srpo", "srpo-bias"])
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = [parts(folder, a.methods, 32, 4) for folder in a.folders]
    print("| | " + " | ".join(PARTS) + " |\n" + "|---" * (len(PARTS) + 1) + "|")
    for label, weights in (("rater's weight", WEIGHTS), ("crowd's weight", CROWD)):
        print(f"| {label} | " + " | ".join(f"{weights[part]:g}" for part in PARTS) + " |")
    for name in a.methods:
        print(f"| {name} | " + " | ".join(" / ".join(f"{one[name][part]:+.2f}" for one in found) for part in PARTS) + " |")


if __name__ == "__main__":
    main()
