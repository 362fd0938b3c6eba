"""How fast the scorer is: this package's way against the original packages' way and against the bare image tower.

`python -m tests.parity.benchmark` prints the table of docs/rewards.md: random weights, PNG files of 512×512 on disk, all ways
one after the other in every round, medians over rounds. On the CPU the tower has one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from tests.parity.pixels import natural_images
from trainer.data.images import load_bytes, to_pil
from trainer.rewards.clip import ARCHITECTURES, tokenizer
from trainer.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit, normalise
from trainer.rewards.two_tower import TwoTower
from trainer.rewards.weighted import RewardSpec
from trainer.scoring.items import Item
from trainer.scoring.scorer import score

SIZE = 512
Way = Callable[[], Any]


def architecture(name: str) -> Mapping[str, Any]:
    """`ViT-B-32`, `ViT-L-14`, `ViT-H-14`, or one of them cut to so many layers in each tower: `ViT-H-14:4`."""
    base, _, depth = name.partition(":")
    shape = copy.deepcopy(ARCHITECTURES[base])
    if depth:
        shape["vision_cfg"]["layers"] = shape["text_cfg"]["layers"] = int(depth)
    return shape


@torch.no_grad()
def one_by_one(model: Any, tokenize: Any, items: Sequence[Item], device: str) -> list[float]:
    """As hpsv2, image-reward and the PickScore example do it: each image through PIL and alone, its prompt encoded every time."""
    scores: list[float] = []
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    for item in items:
        small = Image.open(item.path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1) - mean) / std
        image = F.normalize(model.encode_image(pixels[None].to(device)), dim=-1)
        text = F.normalize(model.encode_text(tokenize([item.prompt]).to(device)), dim=-1)
        scores.append(float((image * text).sum()))
    return scores


@torch.no_grad()
def bare_tower(model: Any, ready: torch.Tensor, batch: int) -> list[float]:
    """The image tower alone on pixels that are decoded, fitted and on the device already."""
    return [float(model.encode_image(part).sum()) for part in ready.split(batch)]


def write_images(folder: Path, number: int) -> list[Path]:
    """Natural-like PNG files; eight different ones are enough, because images are not cached."""
    drawn = [to_pil(image) for image in natural_images([(SIZE, SIZE)] * min(number, 8))]
    paths = [folder / f"{i:03d}.png" for i in range(number)]
    for i, path in enumerate(paths):
        drawn[i % 8].save(path)
    return paths


def measure(model: Any, context: int, items: Sequence[Item], batch: int, rounds: int, device: str) -> dict[str, float]:
    """Images per second by the clock of each way, ratios paired within rounds, and texts encoded per pass of the scorer."""
    tokenize = tokenizer(context)
    encoded: list[int] = []

    def counted(texts: Sequence[str]) -> Any:
        encoded.append(len(texts))
        return tokenize(texts)

    def scored(tower: TwoTower, some: Sequence[Item]) -> list[float]:
        return [row.raw["clip"] for row in score(some, [RewardSpec("clip", tower)], device, batch)]

    known = TwoTower(model, tokenize, Fit(224))
    known.text_features([item.prompt or "" for item in items])
    ready = normalise(torch.stack([Fit(224).of_bytes(load_bytes(i.path)) for i in items]).to(device) / 255)
    ways: dict[str, Way] = {
        "original": lambda: one_by_one(model, tokenize, items, device),
        "ours": lambda: scored(TwoTower(model, counted, Fit(224)), items),  # new prompts
        "known": lambda: scored(known, items),  # cached prompts: only the image side is left
        "bare": lambda: bare_tower(model, ready, batch),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    one_by_one(model, tokenize, items[:1], device)  # the first image warms up
    scored(known, items[:1])
    for _ in range(rounds):
        for name, way in ways.items():
            begin, begin_work = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - begin)
            work[name].append(time.process_time() - begin_work)

    def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
        return statistics.median(b / a for a, b in zip(times[of], times[to]))

    rates = {name: len(items) / statistics.median(values) for name, values in wall.items()}
    effort = work if device == "cpu" else wall  # CPU time leaves other programs out
    ratios = {"speedup": ratio(effort, "ours", "original"), "of_bare": ratio(wall, "known", "bare"), "work": ratio(work, "known", "bare")}
    return {**rates, **ratios, "texts": sum(encoded) / rounds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table row per model, batch and kind of prompts."""
    import open_clip

    parser = argparse.ArgumentParser(prog="python -m tests.parity.benchmark", description=main.__doc__)
    parser.add_argument(
        "--model", action="append", help="ViT-B-32, ViT-L-14, ViT-H-14, or with a depth, ViT-H-14:4 (default B/32 and H at depth 4)"
    )
    parser.add_argument("--batch", type=int, action="append", help="may be given several times (default 1, 8, 32)")
    parser.add_argument("--images", type=int, default=0, help="images per pass (default twice the batch, at least 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--prompts", action="append", choices=["one", "distinct"], help="one prompt for all, or one for each (default both)"
    )
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = ["model", "batch", "prompts", "one by one /s", "ours /s", "ours, prompts known /s", "image tower alone /s"]
    columns += ["ours : one by one", "known : tower, clock", "known : tower, CPU time", "texts encoded"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in parsed.model or ["ViT-B-32", "ViT-H-14:4"]:
        shape = architecture(name)
        torch.manual_seed(0)
        model: Any = open_clip.CustomTextCLIP(**shape).to(parsed.device).eval().requires_grad_(False)
        for batch in parsed.batch or [1, 8, 32]:
            number = parsed.images or max(2 * batch, 8)
            with tempfile.TemporaryDirectory() as folder:
                paths = write_images(Path(folder), number)
                for kind in parsed.prompts or ["one", "distinct"]:
                    items = [Item(path, f"a photo of thing number {i if kind == 'distinct' else 0}") for i, path in enumerate(paths)]
                    context = shape["text_cfg"]["context_length"]
                    m = measure(model, context, items, batch, parsed.rounds, parsed.device)
                    rates = " | ".join(f"{m[way]:.2f}" for way in ("original", "ours", "known", "bare"))
                    ratios = f"{m['speedup']:.2f}× | {m['of_bare']:.2f}× | {m['work']:.2f}×"
                    print(f"| {name} | {batch} | {kind}, {number} images | {rates} | {ratios} | {m['texts']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
