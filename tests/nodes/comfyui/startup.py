"""What the pack adds to ComfyUI's start: fresh processes with and without it, in turn.

Usage: startup.py COMFYUI PACK PAIRS. Prints a Markdown table. By hand: no test asserts a time. Works in a temporary folder.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

comfy_path, pack, pairs = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])


def start(folder, with_pack):
    """Seconds on the clock and of the processor from start to ready, and what ComfyUI says that the pack's import took."""
    nodes = folder / ("with" if with_pack else "without") / "custom_nodes"
    if not nodes.exists():
        nodes.mkdir(parents=True)
        if with_pack:
            (nodes / pack.name).symlink_to(pack)
    (nodes.parent / "extra.yaml").write_text(f"test:\n  custom_nodes: {nodes}\n", "utf-8")
    command = [sys.executable, comfy_path / "main.py", "--cpu", "--quick-test-for-ci", "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:", "--extra-model-paths-config", nodes.parent / "extra.yaml"]
    for name in ("output", "temp", "user", "input"):
        (nodes.parent / name).mkdir(exist_ok=True)
        command += [f"--{name}-directory", nodes.parent / name]
    wall, before = time.perf_counter(), os.times()
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    said = re.findall(rf"([0-9.]+) seconds(.*): .*{re.escape(str(nodes / pack.name))}", done.stdout + done.stderr)
    assert len(said) == with_pack and not any(failed.strip() for _, failed in said), done.stderr[-2000:]
    return time.perf_counter() - wall, cpu, float(said[0][0]) if said else 0.0


os.environ["OMP_NUM_THREADS"] = "1"
with tempfile.TemporaryDirectory() as name:
    for with_pack in (True, False):
        start(Path(name), with_pack)  # the first reads files that the others find in memory
    runs = {True: [], False: []}
    for i in range(pairs):
        for with_pack in (True, False) if i % 2 else (False, True):
            runs[with_pack].append(start(Path(name), with_pack))
print("| | s on the clock | s of the processor |\n|---|---|---|")
for with_pack, label in ((False, "ComfyUI alone"), (True, "with the pack")):
    print(f"| {label} | {statistics.median(r[0] for r in runs[with_pack]):.2f} | {statistics.median(r[1] for r in runs[with_pack]):.2f} |")
more = [[w[i] - o[i] for w, o in zip(runs[True], runs[False])] for i in (0, 1)]
print(f"| difference, median of {pairs} pairs | {statistics.median(more[0]):.2f} | {statistics.median(more[1]):.2f} |")
print(f"\nThe import as ComfyUI times it: {statistics.median(r[2] for r in runs[True]):.1f} s.")
