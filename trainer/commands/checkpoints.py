"""The tuned models that `evaluate` compares: LoRA files by name, and the snapshots of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError
from ..lora.file import PEFT_WEIGHTS, lora_weights, read_metadata
from ..metrics.study import BASE
from ..training.folder import snapshots


@dataclass(frozen=True)
class Checkpoint:
    """One LoRA file: the name of its run, and the optimizer step it was saved at; None where the file does not say."""

    run: str
    step: int | None
    file: Path


def checkpoints(given: Sequence[str]) -> dict[str, Checkpoint]:
    """Checkpoints by their name in the results, from `NAME=FILE`, `NAME=FOLDER` of a run, or either without a name.

    The name is the run's or, of several checkpoints of one run, `NAME@STEP`.
    """
    found: dict[str, list[Checkpoint]] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        for file in _files(Path(path)):
            run = name or Path(path).stem
            step = read_metadata(file).get("step") if lora_weights(file).is_file() else None
            found.setdefault(run, []).append(Checkpoint(run, step, file))
    named: dict[str, Checkpoint] = {}
    for run, members in found.items():
        steps = [checkpoint.step for checkpoint in members]
        if run == BASE[0] or (len(steps) > 1 and (None in steps or len(set(steps)) < len(steps))):
            raise ConfigError(f"two models are called {run}: give --lora NAME=FILE")
        named |= {f"{run}@{c.step}" if len(members) > 1 else run: c for c in sorted(members, key=lambda c: c.step or 0)}
    missing = next((c.file for c in named.values() if not lora_weights(c.file).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"no LoRA file {missing}")
    return named


def _files(path: Path) -> list[Path]:
    """A LoRA file or peft folder as it is; of a run's folder its snapshots and, where it is of a later step, its result."""
    if not path.is_dir() or (path / PEFT_WEIGHTS).is_file():
        return [path]
    kept = snapshots(path)
    results = [file for file in (path / "lora.safetensors", path / "delta.safetensors") if file.is_file()]
    last = [file for file in results if read_metadata(file).get("step") not in kept]
    if not kept and not last:
        raise ConfigError(f"{path} holds no LoRA: give a file, or the folder of a run with snapshot_every")
    return [*kept.values(), *last]
