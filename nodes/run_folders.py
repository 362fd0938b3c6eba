"""The folders of training runs in a graph: a new one, or one to resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .lora import runs_folder

NEW, LAST = "a new run", "the last run of this name"


def resumable() -> list[str]:
    """Runs that have a checkpoint, newest first."""
    found = sorted(runs_folder().glob("*/checkpoint.pt"), key=lambda p: -p.stat().st_mtime)
    return [p.parent.name for p in found]


def run_folder(name: str, resume: str) -> Path:
    """The folder of the run to resume, or one that no run has used: name, name_2, name_3, …"""
    plain_name = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ") or "run"
    if resume == NEW:
        number = 1
        while (folder := runs_folder() / (plain_name if number == 1 else f"{plain_name}_{number}")).exists():
            number += 1
        return folder
    runs = resumable()
    found = [run for run in runs if run == resume or (resume == LAST and re.fullmatch(rf"{re.escape(plain_name)}(_\d+)?", run))]
    if not found:
        wanted = f"named {plain_name!r}" if resume == LAST else repr(resume)
        raise ValueError(f"no run {wanted} to resume: choose one of {', '.join(runs) or 'none yet'}")
    return runs_folder() / found[0]


def logged(folder: Path) -> dict[str, list[float]]:
    """`loss` of every step of a run, and `reward` and `accuracy` where its objective logs them."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    return {name: [line[name] for line in log if name in line] for name in ("loss", "reward", "accuracy")}
