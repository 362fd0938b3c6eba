"""`python -m trainer train`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..config import ConfigError, build, override, plain, read_toml
from ..memory.oom import remedy
from ..memory.planner import Planner, data_report
from ..memory.savings import fit_vram
from ..models.diffusers_policy import DiffusersPolicy
from ..models.distilled import warning_of
from ..models.load import ModelOptions
from ..objectives import OBJECTIVES
from ..policy import Lora
from ..runtime.device import OutOfMemory, is_out_of_memory, peak_gb, set_precision
from ..runtime.processes import Processes, joined
from ..training.config import TrainConfig, Watch
from ..training.console import follow
from ..training.folder import BEST, check_folder, claim, files_of
from ..training.parts import check_heldout
from ..training.run import Run
from .options import quiet_libraries
from .parts import load_parts, place_parts
from .preset import command_for

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`, and to its help the settings."""
    parser.usage = "python -m trainer train [CONFIG.toml] [--resume] [--overwrite] [--plan] [--vram GB] [--allow-remote] [--key=value ...]"
    parser.add_argument("config", type=Path, nargs="?", help="TOML file of settings; --key=value replaces those in it, or all")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    parser.add_argument("--plan", action="store_true", help="print the predicted peak memory and what reduces it; train nothing")
    parser.add_argument("--allow-remote", action="store_true", help="the setting allow_remote")
    parser.add_argument("--vram", type=float, metavar="GB", help="the setting vram")
    tables = {"model": ("model_options", ModelOptions), "adapter": ("lora", Lora), "watch": ("watch", Watch)}
    lines = ["settings:", *_settings(TrainConfig, "", {"objective", *(key for key, _ in tables.values())})]
    for title, (key, cls) in tables.items():
        lines += ["", f"{title}:", *_settings(cls, f"{key}.")]
    for name, cls in OBJECTIVES.items():
        lines += ["", f"objective {name} (--objective.name={name}):", *_settings(cls, "objective.")]
    several = "torchrun --nproc-per-node 8 -m trainer train …` or `accelerate launch --multi_gpu -m trainer train …"
    parser.description = f"""{parser.description}

Ctrl-C finishes the step and saves a checkpoint; --resume continues from it. Several processes share every micro-batch:
`{several}`."""
    parser.epilog = "\n".join(lines)


def _settings(cls: Any, prefix: str, without: set[str] | None = None) -> list[str]:
    """Help lines of a dataclass: key, meaning, default."""
    lines: list[str] = []
    for f in fields(cls):
        if f.name not in (*(without or ()), *getattr(cls, "unread", ())):
            default = "" if f.default is MISSING or f.default in ("", None) else f" [{json.dumps(plain(f.default))}]"
            lines.append(f"  {'--' + prefix + f.name + '=…':<36} {f.metadata.get('help', '')}{default}")
    return lines


def run(args: argparse.Namespace) -> int:
    """Train a LoRA, or plan its memory; returns the exit status, 130 after Ctrl-C."""
    with joined() as processes:
        return _train(args, processes)


def _train(args: argparse.Namespace, processes: Processes) -> int:
    if args.config and not args.config.exists() and (command := command_for(args.config)):
        raise ConfigError(f"no config file {args.config}; this command writes it: {command}")
    values = override(read_toml(args.config) if args.config else {}, args.settings)
    if args.vram is not None:
        values["vram"] = args.vram
    if args.allow_remote:
        values["allow_remote"] = True
    if args.plan and not args.resume:
        values.setdefault("out", ".")  # a plan writes nothing
    config = build(TrainConfig, values)
    quiet_libraries()
    planner = Planner(processes)
    if config.vram:
        given = [name for key, value in values.items() for name in ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key])]
        fitted = fit_vram(config, given, planner, processes.count, resume=args.resume) if processes.main else config
        config = processes.exchange(fitted)[0]
    if args.plan:
        check_heldout(config, {})
        if processes.main:
            if (report := data_report(config)).source:
                report.show()
            _warn(config, planner.policy(config))
            print(planner.report(config))
        return 0
    try:
        return _run(config, args, processes, planner)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(remedy(config, planner, error)) from error


def _run(config: TrainConfig, args: argparse.Namespace, processes: Processes, planner: Planner) -> int:
    device = processes.device(config.device)
    set_precision(device, deterministic=config.deterministic)
    if processes.main or args.resume:  # a new run's other processes might see what the first one writes
        check_folder(Path(config.out), overwrite=args.overwrite, resume=args.resume)
    parts = load_parts(config, device, processes, resume=args.resume)
    lock = claim(Path(config.out), overwrite=args.overwrite, resume=args.resume) if processes.main else None
    if processes.main and isinstance(parts.policy, DiffusersPolicy):
        _warn(config, parts.policy)
    place_parts(config, parts, device)
    run = Run(config, parts, lock)
    run.open_folder(overwrite=args.overwrite, resume=args.resume)
    for _ in follow(run):
        pass
    if processes.main:
        _report(run, planner, device)
    return 0 if run.last else 130


def _warn(config: TrainConfig, policy: DiffusersPolicy) -> None:
    """Say how a distilled model is trained, where the settings do not."""
    text = warning_of(policy, config.model)
    if text and not (config.training_adapter or config.watch.tuned_model or config.method.trains_distilled):
        log.warning("warning: %s", text)


def _report(run: Run, planner: Planner, device: str) -> None:
    if not run.last:
        print(f"stopped after step {run.step}; saved {run.checkpoint_path}; go on with --resume")
        return
    written = " and ".join(map(str, files_of(run.result, run.config.method.companions).values()))
    print(f"wrote {written} after step {run.step}: every key read back")
    if planner.last:
        print(f"peak memory: {peak_gb(device):.2f} GB; planned {planner.last.total / 1e9:.2f} GB")
    if run.evaluation:
        best = run.best
        print(f"best held-out at step {best['step']:.0f} ({best['heldout']:.3f}): {run.folder / BEST}")
