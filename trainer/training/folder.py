"""The folder of a run: `config.json`, `log.jsonl`, `checkpoint.pt` and the results; one run at a time, resumed with equal settings."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..config import ConfigError, build, plain, present_names
from ..data.fingerprint import Fingerprint, difference
from ..objectives import OBJECTIVES
from ..policy import ATTENTION, with_companions
from ..rewards.weighted import parse_weights
from ..runtime.files import check_weights, free_bytes, named, write_text
from .config import TrainConfig

log = logging.getLogger(__name__)

CHECKPOINT, LOG, CONFIG, WATCH, BEST = "checkpoint.pt", "log.jsonl", "config.json", "watch.json", "best.safetensors"
LOCK = ".lock"
_STATE = {"step", "adapter", "optimizer", "ema", "objective", "points", "calls", "settings", "base"}
_PATHS = (
    "model",
    *(f"model_options.{key}" for key in ("parts", "text_encoder", "vae")),
    "consistency",
    "training_adapter",
    "images",
    "pairs",
    "labels",
    "prompts",
    "watch.prompts",
    "watch.reference",
    "watch.tuned_model",
    "watch.tuned_parts",
)
_REWARDS = ("reward", "features", "watch.heldout")  # known by their weights where those are recorded
_SNAPSHOT = re.compile(r"(lora|delta)-(\d{6,})\.safetensors")
_RESULTS = ("lora.safetensors", "delta.safetensors", BEST)
COMPANIONS = sorted({name for objective in OBJECTIVES.values() for name in objective.companions})
"""Of all objectives: what may lie beside each of the results, as `lora-loser.safetensors`."""


def check_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """ConfigError where there is nothing to resume, or where a new run would mix with an old one."""
    if resume:
        if not (folder / CHECKPOINT).is_file():
            raise ConfigError(f"nothing to resume: no {folder / CHECKPOINT}")
    elif not overwrite and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"{named(folder)} exists: add --overwrite to replace its run, or --resume to go on")


def claim(folder: Path, *, overwrite: bool, resume: bool) -> FileLock:
    """Lock the folder until this process ends; ConfigError as `check_folder`, or where another run has it."""
    check_folder(folder, overwrite=overwrite, resume=resume)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another run is writing to {folder}: wait for it, or give another `out`") from error
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error
    return lock


def clear(folder: Path) -> None:
    """Remove the files of an earlier run."""
    try:
        for name in (LOG, CHECKPOINT, WATCH):
            (folder / name).unlink(missing_ok=True)
        for path in (*(folder / name for name in _RESULTS), *snapshots(folder).values()):
            for file in files_of(path, COMPANIONS).values():
                file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error


def files_of(result: Path, companions: Iterable[str]) -> dict[str, Path]:
    """The file of a result and those beside it, by the adapter that each holds."""
    names = tuple(companions)
    return dict(zip(with_companions("tuned", names), map(result.with_stem, with_companions(result.stem, names))))


def snapshot(result: Path, step: int) -> Path:
    """Where the snapshot of a step lies, beside the run's result: `lora-000015.safetensors`."""
    return result.with_name(f"{result.stem}-{step:06d}{result.suffix}")


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a run by step, in their order."""
    found = {int(match[2]): path for path in folder.glob("*.safetensors") if (match := _SNAPSHOT.fullmatch(path.name))}
    return dict(sorted(found.items()))


def check_room(config: TrainConfig, step: int, size: int) -> None:
    """ConfigError where the disk cannot take the snapshots after `step`, of `size` bytes each, beside SQDF's buffer."""
    if not config.snapshot_every:
        return
    steps = (
        config.steps if not config.budget else min(config.steps, config.budget // (config.batch_size * config.gradient_accumulation_steps))
    )
    count = max(0, steps // config.snapshot_every - step // config.snapshot_every)
    buffer_gb: float = getattr(config.method, "buffer_gb", 0.0) if step == 0 else 0.0
    needed, free = count * size / 1e9 + buffer_gb, free_bytes(Path(config.out)) / 1e9
    if needed > free:
        raise ConfigError(
            f"snapshot_every = {config.snapshot_every}: {count} snapshots of {size / 1e9:.3g} GB{' and the buffer' if buffer_gb else ''} "
            f"take {needed:.3g} GB, but {config.out} lies on a disk with {free:.3g} GB free: raise it"
        )


def write_config(config: TrainConfig, folder: Path) -> None:
    """The settings as `config.json`."""
    write_text(json.dumps(plain(config), indent=2) + "\n", folder / CONFIG)


def append_log(folder: Path, line: Mapping[str, Any]) -> None:
    """One step's line of the log."""
    path = folder / LOG
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; the last checkpoint is intact") from error


def trim_log(folder: Path, step: int) -> None:
    """Drop the log lines of steps after the checkpoint: the resumed run takes these steps again."""
    path = folder / LOG
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # cut short by a kill
    write_text("".join(line + "\n" for line in kept), path)


def check_resumable(
    config: TrainConfig,
    state: Mapping[str, Any],
    bases: Sequence[str],
    weights: Mapping[str, Mapping[str, str]],
    data: Mapping[str, Fingerprint],
    parameters: Iterable[str],
) -> None:
    """ConfigError unless settings, base, rewards' weights and names of the trained parameters are those of the checkpoint.

    A reward of equal weights may have another name, such as the folder of an earlier version's; a path may be spelled in another way, and
    data may have moved. bases: hashes of the base, today's first, then as earlier versions took it.

    Settings that it does not have (of an older version) are at their default. Exempt are `steps`, `budget`, `NEUTRAL`,
    and how the samples of an optimizer step are split into micro-batches: samples and noise stay the same, but what an objective
    draws once per micro-batch is drawn anew.
    """
    path = Path(config.out) / CHECKPOINT
    if not isinstance(state, dict) or not state.keys() >= _STATE:
        raise ConfigError(f"{path} is not a checkpoint of a training run; start again with --overwrite")
    if state["base"] not in bases:
        raise ConfigError(
            f"{path} was written over other weights than those of {config.model}: sha256 {state['base'][:12]}, now {bases[0][:12]}; "
            "go on with the model that the run began with"
        )
    before = build(TrainConfig, {"out": config.out, **present_names(json.loads(state["settings"]))})
    then, now = _compared(before, config)
    renamed = _same_weights(path, then, now, state.get("weights"), weights) | _same_data(config, state.get("data"), data)
    renamed |= {key for key in (*_PATHS, *(_REWARDS if state.get("weights") is None else ())) if _same_path(then.get(key), now.get(key))}
    changed = sorted(key for key in {**then, **now} if key not in renamed and then.get(key) != now.get(key))
    if changed == ["batch_size", "gradient_accumulation_steps"] and _per_step(before) == _per_step(config):
        log.warning("micro-batches of %d instead of %d: draws per micro-batch differ", config.batch_size, before.batch_size)
    elif changed:
        key = changed[0]
        raise ConfigError(f"{path} was written with another {key}: {then.get(key)!r}, now {now.get(key)!r}")
    if state["adapter"].keys() != set(parameters):
        raise ConfigError(f"{path} was written with another adapter: give the lora.targets of that run")
    if state["step"] > config.steps:
        raise ConfigError(f"steps = {config.steps}: {path} is at step {state['step']}; give at least as many, or --overwrite")


def check_finished(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """ConfigError unless a finished run's result, which records its `settings`, was trained with these, `steps` and `budget` included."""
    before = build(TrainConfig, {"out": config.out, **present_names(settings)})
    then, now = _compared(before, config)
    for key in ("steps", "budget", *sorted({**then, **now})):
        old, new = (getattr(before, key), getattr(config, key)) if key in ("steps", "budget") else (then.get(key), now.get(key))
        if old != new:
            raise ConfigError(f"{config.out} was trained with another {key}: {old!r}, now {new!r}; give another output folder")


def _compared(before: TrainConfig, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that decide a step, then and now, flat."""
    if config.lora.targets is None and before.lora.targets == ATTENTION:  # 0.1.0's default, which meant the model's attention projections
        before = replace(before, lora=replace(before.lora, targets=None))
    return _flat(_decisive(before)), _flat(_decisive(config))


def _same_data(config: TrainConfig, then: Mapping[str, Fingerprint] | None, data: Mapping[str, Fingerprint]) -> set[str]:
    """Settings whose data are those of the checkpoint, wherever they lie now; ConfigError where they have changed.

    A checkpoint of 0.2.0 or earlier has no fingerprints: its data are taken to be the same where their paths are.
    """
    path, settings = Path(config.out) / CHECKPOINT, _flat(config.describe())
    if then is None and data:
        log.warning("%s records no fingerprint of its data, as files of 0.2.0 and earlier: they are taken to be the same", path)
    known = then or {}
    for key in data.keys() & known.keys():
        changed = difference(known[key], data[key])
        if changed:
            raise ConfigError(
                f"{path} was written with other data, {key} = {settings[key]}: {changed}; "
                "go on with those that the run began with, or start again with --overwrite"
            )
    return {*(data.keys() & known.keys())}


def _same_weights(
    path: Path,
    before: Mapping[str, Any],
    config: Mapping[str, Any],
    then: Mapping[str, Mapping[str, str]] | None,
    now: Mapping[str, Mapping[str, str]],
) -> set[str]:
    """Settings whose rewards have another name and equal weights; ConfigError where a name has other weights than before."""
    if then is None:
        check_weights(path, None, {key: "" for key in now}, "")
        return {key for key in now if str(before[key]).startswith("demo-") and Path(config[key]).is_dir()}  # an earlier embedded one
    renamed: set[str] = set()
    for key in now.keys() & then.keys():
        if before[key] == config[key]:
            check_weights(path, then[key], now[key], f"to go on with the earlier ones give their folder or file: --{key}=PATH")
        elif list(then[key].values()) == list(now[key].values()) and _weights(before[key], now[key]) == _weights(config[key], now[key]):
            renamed.add(key)
    return renamed


def _weights(spec: str, hashes: Mapping[str, str]) -> list[float] | None:
    """The weights of a sum's rewards, in their order; None unless each of them has a file."""
    weights = [weight for _, weight in parse_weights(spec)]
    return weights if len(weights) == len(hashes) else None


def _same_path(a: object, b: object) -> bool:
    """Whether both are spellings of one path that exists: relative or absolute, with a slash at the end, or through a link."""
    return isinstance(a, str) and isinstance(b, str) and os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)


def _decisive(config: TrainConfig) -> dict[str, Any]:
    table = {**plain(config.method), "name": config.objective["name"]}
    return {**config.describe(), "objective": table, "steps": None, "budget": None}


def _flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}  # pyright: ignore[reportUnknownArgumentType]
    return flat


def _per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on; a graph has torch alone."""
    found = {"torch": str(torch.__version__)}
    for package in ("diffusers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
