"""Settings that reduce a run's memory: what each saves, and the fewest that fit a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ConfigError, present_names
from ..models.quantisation import LIBRARIES
from ..training.config import TrainConfig
from .plan import Plan

GB = 1e9
Planned = Callable[[TrainConfig], Plan]


@dataclass(frozen=True)
class Setting:
    """One setting that takes less memory, and its cost."""

    key: str
    value: Any
    cost: str

    def applied(self, config: TrainConfig) -> TrainConfig | None:
        """The config with this setting; None where it has it already, or cannot have it."""
        table, _, name = self.key.rpartition(".")
        options: Any = getattr(config, table) if table else config
        if name.endswith("quantisation") and (getattr(options, name) or not find_spec(LIBRARIES[self.value])):
            return None  # the run would ask for the library
        if getattr(options, name) == self.value or (table == "model_options" and config.tune == "full"):  # which is float32 only
            return None
        changed = replace(options, **{name: self.value})
        return replace(config, **{table: changed}) if table else changed

    @property
    def flag(self) -> str:
        """As on the command line."""
        return f"--{self.key}={str(self.value).lower() if isinstance(self.value, bool) else self.value}"


class Saving(NamedTuple):
    """Flags that reduce memory, what they cost, and the bytes that they save."""

    flag: str
    cost: str
    bytes: int


# Sorted by cost: first the least time, last what changes the result.
SETTINGS = (
    Setting("gradient_checkpointing_vae", True, "the VAE decoder is computed twice"),
    Setting("vae_slicing", True, "images are decoded one at a time"),
    Setting("gradient_checkpointing_denoiser", True, "the denoiser is computed twice where it carries a gradient"),
    Setting("gradient_checkpointing_reward", True, "the reward is computed twice"),
    Setting("offload_encoders", True, "encoders, text towers and the held-out reward wait on the CPU"),
    Setting("reward_dtype", "bfloat16", "rounds the reward"),
    Setting("model_options.dtype", "bfloat16", "rounds the model's weights"),
    Setting("model_options.quantisation", "int8", "rounds the denoiser's weights to int8"),
    Setting("model_options.text_encoder_quantisation", "int8", "rounds the text encoders' weights to int8"),
)


def halved(config: TrainConfig, processes: int = 1) -> tuple[str, TrainConfig] | None:
    """Flags and config of the same samples per step in twice as many micro-batches; None where a micro-batch cannot be halved."""
    if config.batch_size % (2 * processes):
        return None
    size, steps = config.batch_size // 2, 2 * config.gradient_accumulation_steps
    changed = replace(config, batch_size=size, gradient_accumulation_steps=steps)
    return f"--batch_size={size} --gradient_accumulation_steps={steps}", changed


def savings(config: TrainConfig, planned: Planned, processes: int = 1) -> list[Saving]:
    """Each setting that by itself saves at least 1 %."""
    before = planned(config).total
    options = [(s.flag, s.cost, s.applied(config)) for s in SETTINGS]
    if half := halved(config, processes):
        options.append((half[0], "more, smaller micro-batches", half[1]))
    found = [Saving(flag, cost, before - planned(changed).total) for flag, cost, changed in options if changed is not None]
    return [saving for saving in found if saving.bytes > before / 100]


def fit(
    config: TrainConfig, gigabytes: float, given: Collection[str], planned: Planned, processes: int = 1
) -> tuple[TrainConfig, list[str], Plan]:
    """The config with the fewest memory settings, in order, that fits `gigabytes`; the flags that were added; its plan.

    Keys in `given` are left as they are, but for batch_size and gradient_accumulation_steps, which keep their product. Raises
    ConfigError with the least that the run takes where nothing fits.
    """
    found, added, halving = planned(config), list[str](), list[str]()
    for setting in (*SETTINGS, *SETTINGS):  # twice: a setting can move the peak to where an earlier one helps
        if found.total <= gigabytes * GB:
            return config, added, found
        changed = setting.applied(config) if setting.key not in given else None
        if changed is not None and (less := planned(changed)).total < 0.99 * found.total:
            config, found, added = changed, less, [*added, setting.flag]
    while found.total > gigabytes * GB:
        half = halved(config, processes)
        if half is None:
            fixed = [s.flag for s in SETTINGS if s.key in given and s.applied(config) is not None]
            raise ConfigError(
                f"vram = {gigabytes:g}: this run takes at least {found.total / GB:.1f} GB, "
                f"with {' '.join([*added, *halving]) or 'its settings'} "
                f"({found.moment}); reduce image_size or lora.rank, or use a smaller model"
                + (f"; {' '.join(fixed)} would help too, but the config sets otherwise" if fixed else "")
            )
        halving, config, found = [half[0]], half[1], planned(half[1])
    return config, [*added, *halving], found


def fit_vram(config: TrainConfig, given: Collection[str], planned: Planned, processes: int = 1, *, resume: bool = False) -> TrainConfig:
    """The config with the memory settings that fit `vram`, which are printed; a resumed run keeps the settings that it has."""
    written = Path(config.out) / "config.json"
    if not (resume and written.is_file()):
        config, added, found = fit(config, config.vram, given, planned, processes)
        print(f"vram = {config.vram:g} GB: planned {found.total / GB:.1f} GB with {' '.join(added) or 'the given settings'}", flush=True)
        return config
    return keep_settings(config, written, given)


def keep_settings(config: TrainConfig, written: Path, given: Collection[str] = ()) -> TrainConfig:
    """The config with the memory settings of `written`, a run's config.json, but for those in `given`; micro-batches as there."""
    kept = present_names(json.loads(written.read_text("utf-8")))
    for setting in SETTINGS:
        table, _, name = setting.key.rpartition(".")
        if setting.key not in given and (kept.get(table, {}) if table else kept).get(name) == setting.value:
            config = setting.applied(config) or config
    batch = {name: kept[name] for name in ("batch_size", "gradient_accumulation_steps")}
    same = batch["batch_size"] * batch["gradient_accumulation_steps"] == config.batch_size * config.gradient_accumulation_steps
    return replace(config, **batch) if same else config
