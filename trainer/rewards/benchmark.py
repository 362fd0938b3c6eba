"""How fast a two-tower reward is: this package's way against the original packages' way and against the bare image tower.

`python -m trainer.rewards.benchmark` prints the table of docs/rewards.md: random weights, the three ways one after the
other in every round, medians over rounds; on the CPU with one thread and its CPU time.
Pictures are 512×512 and decoded before the clock starts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .clip import ARCHITECTURES, tokenizer
from .preprocess import CLIP_MEAN, CLIP_STD, Fit, normalise
from .two_tower import TwoTower

SIZE = 512


def _architecture(name: str) -> Mapping[str, Any]:
    """`ViT-B-32`, `ViT-L-14`, `ViT-H-14`, or one of them cut to so many layers in each tower: `ViT-H-14:4`."""
    base, _, depth = name.partition(":")
    architecture = copy.deepcopy(ARCHITECTURES[base])
    if depth:
        architecture["vision_cfg"]["layers"] = architecture["text_cfg"]["layers"] = int(depth)
    return architecture


def one_by_one(model: Any, tokenize: Any, pictures: Sequence[Image.Image], prompts: Sequence[str], device: str) -> list[float]:
    """As hpsv2, image-reward and the PickScore example do it: each picture through PIL and alone, its prompt encoded every time."""
    scores: list[float] = []
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    for picture, prompt in zip(pictures, prompts):
        small = picture.resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1) - mean) / std
        image = F.normalize(model.encode_image(pixels[None].to(device)), dim=-1)
        text = F.normalize(model.encode_text(tokenize([prompt]).to(device)), dim=-1)
        scores.append(float((image * text).sum()))
    return scores


def measure(architecture: Mapping[str, Any], batch: int, prompts: Sequence[str], rounds: int, device: str) -> dict[str, float]:
    """Pictures per second of each way, the ratios of their times, and how often the text tower ran, for one batch of pictures."""
    import open_clip

    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**architecture).to(device).eval().requires_grad_(False)
    tokenize = tokenizer(architecture["text_cfg"]["context_length"])
    levels = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in levels]
    loaded = torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()
    ready = normalise(Fit(224)(loaded.to(device) / 255))
    encoded: list[int] = []

    def ours() -> Tensor:
        tower = TwoTower(model, lambda texts: (encoded.append(len(texts)), tokenize(texts))[1], 224)  # prompts not met before
        return tower((loaded.to(device).float() / 255), prompts)

    tower = TwoTower(model, tokenize, 224)
    tower.text_features(prompts)
    ways: dict[str, Callable[[], Any]] = {
        "original": lambda: one_by_one(model, tokenize, pictures, prompts, device),
        "ours": ours,
        "ours_known": lambda: tower((loaded.to(device).float() / 255), prompts),  # prompts met before, as in training
        "bare": lambda: model.encode_image(ready),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            begin = _now(device)
            with torch.no_grad():
                way()
            if number:
                times[name].append(_now(device) - begin)
    rates = {name: batch / statistics.median(values) for name, values in times.items()}
    paired = {
        n: statistics.median(b / a for a, b in zip(times["ours" if n == "original" else "ours_known"], times[n]))
        for n in ("original", "bare")
    }
    return {**rates, "speedup": paired["original"], "of_bare": paired["bare"], "texts": sum(encoded) / (rounds + 1)}


def _now(device: str) -> float:
    """Seconds: of CPU time where the CPU computes, so that other programs do not count; of the clock where a GPU does."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table row per model, batch and kind of prompts."""
    parser = argparse.ArgumentParser(prog="python -m trainer.rewards.benchmark", description=main.__doc__)
    parser.add_argument(
        "--model", action="append", help="ViT-B-32, ViT-L-14, ViT-H-14, or with a depth, ViT-H-14:4 (default B/32 and H at depth 4)"
    )
    parser.add_argument("--batch", type=int, action="append", help="may be given several times (default 1, 8, 32)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = ["model", "batch", "prompts", "one by one /s", "ours /s", "ours, prompts known /s", "image tower alone /s"]
    columns += ["ours : one by one", "known : tower", "texts encoded"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in parsed.model or ["ViT-B-32", "ViT-H-14:4"]:
        for batch in parsed.batch or [1, 8, 32]:
            for kind in ("one", "distinct") if batch > 1 else ("one",):
                prompts = [f"a photo of thing number {i if kind == 'distinct' else 0}" for i in range(batch)]
                m = measure(_architecture(name), batch, prompts, parsed.rounds, parsed.device)
                rates = " | ".join(f"{m[way]:.2f}" for way in ("original", "ours", "ours_known", "bare"))
                print(f"| {name} | {batch} | {kind} | {rates} | {m['speedup']:.2f}× | {m['of_bare']:.2f}× | {m['texts']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
