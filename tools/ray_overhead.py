"""What `score --engine ray` costs beside scoring itself: python -m tools.ray_overhead

Processor time of a command and all that it starts, of few and of many images: what does not grow is Ray's start, what grows is per image.
Needs the extra `scale`. Seconds by the clock depend on what else runs; they are those of the few images.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from trainer.data.images import to_pil
from trainer.demo.world import real_images

ENGINES = {
    "local": ("--out", "scores.csv"),
    "ray, 1 worker": ("--engine", "ray", "--out", "one"),
    "ray, 2 workers": ("--engine", "ray", "--workers", "2", "--out", "two"),
}


def cost(folder: Path, images: str, *flags: str) -> tuple[float, float]:
    """Seconds of processors, of the command and its descendants, and by the clock."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    begin, used = time.monotonic(), dict[int, float]()
    command = [sys.executable, "-m", "trainer", "score", images, "--overwrite", *flags]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            own = psutil.Process(process.pid)
            for each in (own, *own.children(recursive=True)):
                used[each.pid] = sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return sum(used.values()), time.monotonic() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure Ray's overhead in scoring")
    parser.add_argument("--few", type=int, default=64)
    parser.add_argument("--many", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, captions = real_images(args.many, 0)
        for i, (image, caption) in enumerate(zip(images, captions)):
            for kind, count in (("few", args.few), ("many", args.many)):
                if i < count:
                    (folder / kind).mkdir(exist_ok=True)
                    to_pil(image).save(folder / kind / f"{i:05d}.png")
                    (folder / kind / f"{i:05d}.txt").write_text(caption)
        print("| engine | start, processor s | start, clock s | per image, processor ms |\n|---|---|---|---|")
        for engine, flags in ENGINES.items():
            (few, clock), (many, _) = (cost(folder, kind, "--shard-size", "512", *flags) for kind in ("few", "many"))
            each = (many - few) / (args.many - args.few)
            print(f"| {engine} | {few - args.few * each:.1f} | {clock:.0f} | {1000 * each:.2f} |", flush=True)


if __name__ == "__main__":
    main()
