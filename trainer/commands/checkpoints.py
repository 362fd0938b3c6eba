"""The tuned models that `evaluate` compares: LoRA files by name, and the snapshots of training runs."""

from __future__ import annotations

import os
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

    The name is the run's or, of several checkpoints of one run, `NAME@STEP`. Files without a name are runs of their own, called after
    the file and, where that is not unique, the folders that tell it apart: `runA/lora`. A NAME that comes twice is one run.
    """
    found: dict[str, list[Checkpoint]] = {}
    for run, path in _named([split_name(text) for text in given]):
        for file in _files(path):
            step = read_metadata(file).get("step") if lora_weights(file).is_file() else None
            found.setdefault(run, []).append(Checkpoint(run, step, file))
    named: dict[str, Checkpoint] = {}
    for run, members in found.items():
        steps = [checkpoint.step for checkpoint in members]
        if len(steps) > 1 and (None in steps or len(set(steps)) < len(steps)):
            raise _twice(run)
        for checkpoint in sorted(members, key=lambda c: c.step or 0):
            name = f"{run}@{checkpoint.step}" if len(members) > 1 else run
            if name in named or name == BASE[0]:
                raise _twice(name)
            named[name] = checkpoint
    missing = next((c.file for c in named.values() if not lora_weights(c.file).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"no LoRA file {missing}")
    return named


def split_name(text: str) -> tuple[str, Path]:
    """`NAME=FILE` as its two parts, the name "" where there is none. A path that exists is a path, and no name has a slash in it."""
    pieces = text.split("=")
    splits = [("=".join(pieces[:i]), Path("=".join(pieces[i:]))) for i in range(1, len(pieces))]
    valid = [(name, path) for name, path in splits if not {"/", "\\"} & set(name)]
    if Path(text).exists() or not valid:
        return "", Path(text)
    name, path = next((split for split in valid if split[1].exists()), valid[0])
    if not name.strip() or str(path) == ".":
        raise ConfigError(f"--lora {text}: give NAME=FILE, or a file")
    return name.strip(), path


def _named(given: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The pairs, each path without a name under the shortest end of it that no other pair has."""
    taken = {BASE[0], *(name for name, _ in given if name)}
    ends = [_ends(path) for name, path in given if not name]
    twice = next((end[-1] for i, end in enumerate(ends) if end in ends[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice: leave one out, or give it a name, --lora NAME=FILE")

    def shortest(mine: Sequence[str]) -> str:
        others = [other for other in ends if other != mine]
        return next((e for i, e in enumerate(mine) if e not in taken and not any(o[min(i, len(o) - 1)] == e for o in others)), mine[-1])

    return [(name or shortest(_ends(path)), path) for name, path in given]


def _ends(path: Path) -> list[str]:
    """What a path may be called, the shortest first: `lora`, `runA/lora`, and so on; the path itself is the last."""
    full = Path(os.path.abspath(path))
    parts = [*full.parts[1:-1], full.name if full.is_dir() else full.stem]
    return ["/".join(parts[-i:]) for i in range(1, len(parts) + 1)] + [str(full)]


def _twice(name: str) -> ConfigError:
    return ConfigError(f"two models are called {name}: give --lora NAME=FILE")


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
