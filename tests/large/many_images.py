"""Peak memory of `sample` and `score` on the embedded model, by the number of images; prints the table of docs/benchmarks.md.

    python tests/large/many_images.py 500 5000

The largest resident size (ru_maxrss) of each command's own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainer.demo import world

PER_PROMPT = 10


def measured(*arguments: object) -> tuple[float, float]:
    """Peak resident MB, and seconds, of one command."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "trainer", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return usage.ru_maxrss / 1024, time.monotonic() - begin


def main() -> None:
    rows: dict[str, list[tuple[float, float]]] = {}
    numbers = [int(text) for text in sys.argv[1:]]
    for number in numbers:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (folder / "prompts.txt").write_text("".join(c.text + "\n" for c in world.captions(number // PER_PROMPT, "methods")))
            drawn = measured("sample", "--prompts", folder / "prompts.txt", "-n", PER_PROMPT, "--steps", 2, "--out", folder / "images")
            assert len(list((folder / "images").glob("*.png"))) == number
            rows.setdefault("`sample`", []).append(drawn)
            rows.setdefault("`score`", []).append(measured("score", folder / "images", "--out", folder / "scores.csv"))
    print("| command | " + " | ".join(f"{n} images" for n in numbers) + " |\n|---|" + "---|" * len(numbers))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(f"{megabytes:.0f} MB, {seconds:.0f} s" for megabytes, seconds in cells) + " |")


if __name__ == "__main__":
    main()
