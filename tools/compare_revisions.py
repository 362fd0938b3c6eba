"""Compare what two revisions compute: `python tools/compare_revisions.py OLD NEW`, each a git revision or a checkout's folder.

Gradients of all objectives on the embedded model in float64 (tools/revisions/cases.py), then the LoRA of a short run of each preset
for the embedded model, bit for bit. Exits with 1 where something differs by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from revisions.cases import CASES
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
LORA = ROOT / "tests" / "data" / "v010" / "draft-lv" / "lora.safetensors"
ROUNDING = 1e-12  # relative to the largest entry of a gradient


def checkout(revision: str, folder: Path) -> Path:
    """The folder that `revision` names, or a new worktree of it."""
    if Path(revision).is_dir():
        return Path(revision).resolve()
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", folder, revision], check=True)
    return folder


def python(tree: Path, folder: Path, *arguments: str) -> None:
    """Run this Python in `folder` on the trainer of `tree`."""
    settings = {"PYTHONPATH": f"{tree}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: python {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def gradients(tree: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Losses, logs and gradients of a tree through its own driver, or through that of 0.1.0 where it has none; the cases are ours."""
    ours, theirs = ROOT / "tools" / "revisions", tree / "tools" / "revisions" / "present.py"
    shutil.copytree(ours, folder / "revisions", ignore=shutil.ignore_patterns("present.py"))
    if theirs.is_file():
        shutil.copy(theirs, folder / "revisions")
    python(tree, folder, "-m", f"revisions.{'present' if theirs.is_file() else 'v010'}", str(LORA), "gradients.safetensors")
    return load_file(folder / "gradients.safetensors")


def loras(tree: Path, folder: Path, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """LoRAs of the presets for the embedded model after a few steps; presets and rewards are those of 0.1.0 for every revision."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    earlier = tree / "tests" / "data" / "v010" / "rewards" / "proxy"  # where a revision has it, it ships another
    rewards = [f"--reward={earlier}"] if earlier.is_dir() else []
    for preset in sorted((ROOT / "tests" / "data" / "v010" / "presets").glob("*-demo.toml")):
        python(tree, folder, "-m", "trainer", "train", str(preset), f"--out={preset.stem}", f"--steps={steps}", "--watch.every=0", *rewards)
        found[preset.stem] = load_file(folder / preset.stem / "lora.safetensors")
    return found


def compare_gradients(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> bool:
    """Print one line per case; whether all agree."""
    if old.keys() != new.keys():
        print(f"different values: {', '.join(sorted(old.keys() ^ new.keys()))}")
        return False
    print("| objective | loss, absolute | gradient, absolute | gradient, relative |\n|---|---|---|---|")
    agree = True
    for case in CASES:
        keys = [key for key in old if key.startswith(f"{case}: gradient ")]
        loss = float((old[f"{case}: loss"] - new[f"{case}: loss"]).abs())
        off = max(float((old[key] - new[key]).abs().max()) for key in keys)
        relative = off / max(float(old[key].abs().max()) for key in keys)
        print(f"| {case} | {loss:.3g} | {off:.3g} | {relative:.3g} |")
        agree = agree and relative <= ROUNDING and loss <= ROUNDING * max(1.0, float(old[f"{case}: loss"].abs()))
    return agree


def compare_loras(old: dict[str, dict[str, torch.Tensor]], new: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Print one line per preset; whether all are equal, bit for bit."""
    print("\n| preset | tensors | differing tensors | largest difference |\n|---|---|---|---|")
    agree = True
    for preset, tensors in old.items():
        other = new[preset]
        common = tensors.keys() & other.keys()
        changed = [*(tensors.keys() ^ other.keys()), *(key for key in common if not tensors[key].equal(other[key]))]
        largest = max((float((tensors[k] - other[k]).abs().max()) for k in common), default=float("nan"))
        print(f"| {preset} | {len(tensors)} | {len(changed)} | {largest:.3g} |")
        agree = agree and not changed
    return agree


def main() -> int:
    """0 where both revisions agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", help="a git revision, or a checkout's folder")
    parser.add_argument("new", help="a git revision, or a checkout's folder")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of the presets' runs; 0 compares gradients alone (default 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in ("old", "new")}
        try:
            trees = {name: checkout(getattr(arguments, name), folder / "tree") for name, folder in folders.items()}
            for folder in folders.values():
                folder.joinpath("work").mkdir(parents=True)
            agree = compare_gradients(*(gradients(trees[name], folders[name] / "work") for name in folders))
            if arguments.steps:
                agree = compare_loras(*(loras(trees[name], folders[name] / "work", arguments.steps) for name in folders)) and agree
        finally:
            for folder in folders.values():
                if (folder / "tree").is_dir():
                    subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder / "tree"], check=True)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
