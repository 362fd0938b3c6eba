"""Headless training: from a config to a LoRA file, with log, checkpoints, samples and exact resume."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from filelock import FileLock, Timeout

from ..config import ConfigError, build, plain, present_names
from ..data.batches import Batch
from ..data.samples import Samples
from ..lora.file import save_delta, save_lora
from ..memory import oom as memory
from ..models.load import ModelOptions
from ..objectives import OBJECTIVES, Objective, RunContext
from ..objectives.base import ImageFeatures
from ..policy import ATTENTION, Adaptable, Lora, Policy, Trainable
from ..reward import Reward
from ..runtime.hashes import file_hash as file_hash
from ..runtime.processes import ALONE, Processes
from . import checkpoint
from .evaluation import Watch, Watcher
from .loop import Ema, Step, train
from .nfe import CountingPolicy
from .optimizers import Name as OptimizerName
from .optimizers import build_optimizer
from .tracker import Name as TrackerName
from .tracker import Tracker, check_tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Objective and adapter are tables of their own: [objective] and [lora]."""

    out: str = field(metadata={"help": "output folder"})
    objective: dict[str, Any] = field(
        default_factory=lambda: {"name": "imagerefl"}, metadata={"help": "table: name and the objective's fields"}
    )
    model: str = field(default="demo", metadata={"help": "diffusers folder, or `demo` for the embedded model"})
    reward: str = field(
        default="demo-proxy",
        metadata={"help": "a name of `rewards list`, NAME@FILE, a reward folder, a Python file, or a sum: hpsv2.1=1, pickscore=0.5"},
    )
    standardise: bool = field(default=True, metadata={"help": "put the reward on its stored scale: standard deviations of base images"})
    images: str = field(
        default="",
        metadata={"help": "pictures with .txt captions (subfolders N_name count N times), CSV, JSONL, `hf:DATASET[:split]`, or `demo`"},
    )
    prompts: str = field(default="", metadata={"help": "text file, one prompt per line, where no images are used"})
    image_size: int = field(default=0, metadata={"min": 0, "help": "pixels of the square training images; 0: what the model was made for"})
    buckets: bool = field(
        default=False, metadata={"help": "images keep their aspect ratio: sizes of about image_size² pixels, one to a micro-batch"}
    )
    model_options: ModelOptions = field(default_factory=ModelOptions, metadata={"help": "table: how the model's files are taken"})
    cache: str = field(default="", metadata={"help": "folder that keeps encoded images and prompts for later runs; runs may share it"})
    tune: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "lora trains an adapter; full every weight of the denoiser, and writes the differences"}
    )
    lora: Lora = field(default_factory=Lora, metadata={"help": "table: the adapter"})
    delta_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"help": "of the differences that tune = full writes; bfloat16 halves the file, each off by up to 0.4 %"},
    )
    consistency: str = field(default="", metadata={"help": "consistency LoRA (LCM-LoRA) that an objective may estimate x0 with, or `demo`"})
    features: str = field(default="", metadata={"help": "two-tower reward whose features a black-box objective's surrogate reads"})
    steps: int = field(default=100, metadata={"min": 1, "help": "optimizer steps"})
    budget: int = field(
        default=0, metadata={"min": 0, "help": "denoiser calls after which training ends (a forward 1, a backward 2 more); 0: no limit"}
    )
    batch_size: int = field(default=8, metadata={"min": 1, "help": "samples per micro-batch, of all processes together"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"min": 1, "help": "micro-batches per optimizer step; gradients are averaged"}
    )
    optimizer: OptimizerName = field(
        default="adamw", metadata={"help": "adamw, adamw-fused (one kernel), or adamw-8bit (a quarter of its memory; needs bitsandbytes)"}
    )
    learning_rate: float = field(default=1e-4, metadata={"min": 0.0, "help": "AdamW learning rate"})
    lr_warmup_steps: int = field(default=0, metadata={"min": 0, "help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.0, metadata={"min": 0.0, "help": "AdamW weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"min": 0.0, "help": "gradient clipping; 0 is off"})
    ema: float = field(
        default=0.0, metadata={"min": 0.0, "max": 0.99999, "help": "decay of the averaged adapter that is saved; 0 saves the last"}
    )
    seed: int = field(default=0, metadata={"min": 0, "help": "seed of every draw"})
    save_every: int = field(default=50, metadata={"min": 1, "help": "steps between checkpoints"})
    gradient_checkpointing_denoiser: bool = field(default=False, metadata={"help": "recompute UNet activations: less memory, more time"})
    gradient_checkpointing_vae: bool = field(default=False, metadata={"help": "recompute VAE decoder activations"})
    gradient_checkpointing_reward: bool = field(default=False, metadata={"help": "recompute reward activations"})
    vae_slicing: bool = field(default=False, metadata={"help": "decode one image at a time: the decoder's memory is one image's"})
    offload_encoders: bool = field(
        default=True,
        metadata={
            "help": "encoders, rewards' text towers and, between looks, the watching reward wait on the CPU while an accelerator trains"
        },
    )
    merge_rollouts: bool = field(
        default=True, metadata={"help": "the LoRA lies in the weights while a rollout needs no gradient (float32 weights only)"}
    )
    channels_last: bool = field(default=False, metadata={"help": "convolutions with channels as the fastest dimension, for tensor cores"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the denoiser's blocks: minutes at the start, faster steps"})
    reward_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of the trained reward's weights: float32 or bfloat16"}
    )
    vram: float = field(
        default=0.0,
        metadata={"min": 0.0, "help": "GB that the run must fit: memory settings are switched on until it does; 0: as they are"},
    )
    watch: Watch = field(default_factory=Watch, metadata={"help": "table: a held-out reward to watch, keep the best by, and stop by"})
    tracker: TrackerName = field(default="", metadata={"help": "tensorboard or wandb, beside log.jsonl"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps or xpu"})

    def build_objective(self) -> Objective:
        """The objective that the table names."""
        table = dict(self.objective)
        name = table.pop("name", None)
        if name not in OBJECTIVES:
            raise ConfigError(f"objective.name = {name!r}: use one of {', '.join(OBJECTIVES)}")
        return build(OBJECTIVES[name], table, "objective.")

    def describe(self) -> dict[str, Any]:
        """The settings that decide the result, for metadata."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in NEUTRAL}


_ELSEWHERE = ("out", "save_every", "tracker", "device", "cache")
_MEMORY = (
    "vram",
    "gradient_checkpointing_denoiser",
    "gradient_checkpointing_vae",
    "gradient_checkpointing_reward",
    "vae_slicing",
    "offload_encoders",
)
_SPEED = ("merge_rollouts", "channels_last", "compile")
NEUTRAL = frozenset((*_ELSEWHERE, *_MEMORY, *_SPEED))
"""Settings that alter neither draws nor, but for rounding, results. A run may resume with others."""


def _samples(settings: Mapping[str, Any]) -> int:
    """Samples per optimizer step."""
    return settings["batch_size"] * settings["gradient_accumulation_steps"]


def _default(name: str) -> Objective:
    return OBJECTIVES[name]()


def _tune_weights(policy: Trainable) -> None:
    try:
        policy.tune_weights()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _shard(policy: Trainable, config: TrainConfig, processes: Processes) -> None:
    for key, needed in (("tune", "lora"), ("compile", False), ("channels_last", False)):
        if getattr(config, key) != needed:
            raise ConfigError(f"{key} = {getattr(config, key)}: sharded weights (FSDP) are for {key} = {needed}; launch with --multi_gpu")
    policy.shard(processes.weights_mesh(policy.device))


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; a second one interrupts as usual."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopping
    finally:
        signal.signal(signal.SIGINT, previous)


CHECKPOINT = "checkpoint.pt"
LOCK = ".lock"


def check_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to resume where nothing was saved, and to begin where a run lies already."""
    if resume:
        if not (folder / CHECKPOINT).is_file():
            raise ConfigError(f"nothing to resume: no {folder / CHECKPOINT}")
    elif not overwrite and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"{folder} exists: add --overwrite to replace its run, or --resume to go on")


def claim(folder: Path, *, overwrite: bool, resume: bool) -> FileLock:
    """The folder for this process alone until it ends, however it ends; refused where `check_folder` would, or another run has it."""
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


def check_settings(config: TrainConfig, samples: Samples, context: RunContext, watched: bool) -> Objective:
    """The objective of a run, or a ConfigError where it cannot work with what it is given."""
    objective = config.build_objective()
    if objective.needs_gradient and context.reward is not None and not context.reward.differentiable:
        takers = ", ".join(name for name in OBJECTIVES if not _default(name).needs_gradient)
        raise ConfigError(f"reward {config.reward} has no gradient: use an objective that needs none ({takers})")
    if not issubclass(samples.data, objective.data):
        name = config.objective["name"]
        wanted, given = objective.data.__name__.lower(), samples.data.__name__.lower()
        raise ConfigError(f"{name} trains on {wanted} as it is set, and the data are {given}: give `images`, or other settings")
    if config.watch.every and not watched:
        raise ConfigError("watch.every is set, but nothing watches: give watch.heldout")
    if config.batch_size % context.processes.count:
        raise ConfigError(
            f"batch_size = {config.batch_size}: {context.processes.count} processes share a micro-batch, give a multiple of that"
        )
    try:
        check_tracker(config.tracker)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        objective.check(context)
    except ValueError as error:
        raise ConfigError(f"{config.objective['name']}: {error}") from error
    return objective


class Run:
    """A training run and its folder: `config.json`, `log.jsonl`, `checkpoint.pt`, `lora.safetensors` (`delta.safetensors` where
    every weight is tuned); watched, also `watch.json` and `best.safetensors`.

    `features` are for objectives that need some, `watcher` is asked every `config.watch.every` steps. Several processes
    share every micro-batch, whose samples are those that one process would take: how many there are changes no setting, no
    draw and no file, so a run may resume with another number. The first one writes, all of them read the folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Trainable,
        samples: Samples,
        reward: Reward,
        base_hash: str = "",
        features: ImageFeatures | None = None,
        watcher: Watcher | None = None,
        processes: Processes = ALONE,
        lock: FileLock | None = None,
    ) -> None:
        self.processes = processes
        self.config, self.policy, self.samples, self.reward, self.watcher = config, policy, samples, reward, watcher
        self.counted = CountingPolicy(policy)
        self.folder = Path(config.out)
        prompts = tuple(dict.fromkeys(samples.prompts))
        self.context = RunContext(cast(Policy, self.counted), reward, features, processes, self.folder, prompts)
        self.objective = check_settings(config, samples, self.context, watcher is not None)
        self.loss = self.objective.begin(self.context)
        if config.tune == "full":
            _tune_weights(policy)
        elif policy.lora is None:
            policy.add_lora(config.lora, config.seed)
        if processes.sharded:
            _shard(policy, config, processes)
        policy.gradient_checkpointing(denoiser=config.gradient_checkpointing_denoiser, vae=config.gradient_checkpointing_vae)
        try:
            self.optimizer = build_optimizer(config.optimizer, policy.parameters(), config.learning_rate, config.weight_decay)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.ema = Ema(policy.named_parameters(), config.ema) if config.ema > 0 else None
        self.step = 0
        self.base_hash = base_hash
        self._lock = lock

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """Where the resumable state lives."""
        return self.folder / CHECKPOINT

    def open_folder(self, *, overwrite: bool, resume: bool) -> None:
        """Create the output folder, or refuse one that holds a run already."""
        if resume:
            check_folder(self.folder, overwrite=False, resume=True)  # by every process: an error that all have is said once
            if self.processes.main:
                self._lock = self._lock or claim(self.folder, overwrite=False, resume=True)
            self.load()
            if self.processes.main:  # settings of memory and speed may be new
                checkpoint.write_text(json.dumps(plain(self.config), indent=2) + "\n", self.folder / "config.json")
        elif self.processes.main:
            self._clear_folder(overwrite)
        self.processes.exchange(None)

    def _clear_folder(self, overwrite: bool) -> None:
        self._lock = self._lock or claim(self.folder, overwrite=overwrite, resume=False)
        try:
            for name in ("log.jsonl", "checkpoint.pt", "lora.safetensors", "delta.safetensors", "watch.json", "best.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
            (self.folder / "config.json").write_text(json.dumps(plain(self.config), indent=2) + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write to {self.folder}: {error}") from error

    def save(self) -> None:
        """Write the resumable state. All processes call this, at the same step."""
        calls = self._calls()
        if self.processes.main:
            checkpoint.save(self._state(calls), self.checkpoint_path)
            self.loss.saved()
        self.processes.exchange(None)

    def _calls(self) -> int:
        """Denoiser calls of all processes."""
        return sum(self.processes.exchange(self.counted.calls))

    def _state(self, calls: int) -> dict[str, Any]:
        return {
            "step": self.step,
            "adapter": {name: p.detach() for name, p in self.policy.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.values if self.ema else {},
            "objective": self.loss.state(),
            "points": self.watcher.points if self.watcher else [],
            "calls": calls,
            "settings": json.dumps(self.config.describe(), sort_keys=True),
            "base": self.base_hash,
        }

    def load(self) -> None:
        """Restore the state of `checkpoint.pt`; the settings must be those it was written with.

        Free are `steps`, `budget`, NEUTRAL, and how the samples of an optimizer step are cut into micro-batches: the samples
        and their noise stay the same, but an objective that draws once per micro-batch draws otherwise.
        """
        state = checkpoint.load(self.checkpoint_path)
        if state["base"] != self.base_hash:
            raise ConfigError(f"{self.checkpoint_path} was written over other weights than those of {self.config.model}")
        then, now = present_names(json.loads(state["settings"])), json.loads(json.dumps(self.config.describe()))
        if now["lora"]["targets"] is None and then["lora"]["targets"] == [*ATTENTION]:
            then["lora"]["targets"] = None  # in 0.1.0 the default, which meant the model's own attention projections
        changed = sorted(k for k in now if k not in ("steps", "budget") and now[k] != then.get(k))
        if changed == ["batch_size", "gradient_accumulation_steps"] and _samples(now) == _samples(then):
            log.warning(
                "micro-batches of %d instead of %d: what is drawn once per micro-batch is drawn anew", now["batch_size"], then["batch_size"]
            )
        elif changed:
            raise ConfigError(
                f"{self.checkpoint_path} was written with another {changed[0]}: {then.get(changed[0])!r}, now {now[changed[0]]!r}"
            )
        if state["adapter"].keys() != dict(self.policy.named_parameters()).keys():
            raise ConfigError(f"{self.checkpoint_path} was written with another adapter: give the lora.targets of then")
        self._write(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.values = {k: state["ema"][k].to(v.device) for k, v in self.ema.values.items()}
        self.loss.restore(state["objective"])
        if self.watcher:
            self.watcher.points = state["points"]
        self.step = state["step"]
        if self.processes.main:
            self.counted.calls = state["calls"]
            self._trim_log()

    def _trim_log(self) -> None:
        """Drop the log lines of steps after the checkpoint: they will be taken again."""
        path = self.folder / "log.jsonl"
        if not path.is_file():
            return
        kept: list[str] = []
        for line in path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line that a kill cut short
        checkpoint.write_text("".join(line + "\n" for line in kept), path)

    # -- training ------------------------------------------------------------------------------------------------

    def batches(self, step: int, micro: int) -> Batch:
        """This process's share of micro-batch `micro` of optimizer step `step`."""
        number = step * self.config.gradient_accumulation_steps + micro
        return self.samples.batch(self.config.seed, step, number, self.config.batch_size, self.processes.share(self.config.batch_size))

    def steps(self) -> Iterator[Step]:
        """Train until config.steps, the budget or the watch ends it, logging each step and saving every `save_every`.

        A step that is not finite raises NonFinite and saves nothing: the last checkpoint stays good.
        """
        c = self.config
        tracker = Tracker(c.tracker, self.folder) if c.tracker and self.processes.main else None
        rate = (lambda s: c.learning_rate * min(1.0, (s + 1) / c.lr_warmup_steps)) if c.lr_warmup_steps else None
        begin = time.monotonic()
        if self.watcher and not self.watcher.points:
            self._look()  # before training: what diversity is measured against
        loop = train(
            self.loss,
            self.batches,
            list(self.policy.parameters()),
            self.optimizer,
            steps=c.steps,
            start=self.step,
            accumulate=c.gradient_accumulation_steps,
            max_grad_norm=c.max_grad_norm,
            learning_rate=rate,
            processes=self.processes,
        )
        try:
            for done in loop:
                if self.ema:
                    self.ema.update(self.policy.named_parameters())
                self.step = done.number
                calls = self._calls()
                line = {"step": done.number, "loss": done.loss, "grad_norm": done.grad_norm, "calls": calls, **done.logs}
                held = memory.peak_gb(c.device)
                if held is not None:
                    line["memory_gb"] = round(held, 3)
                self._write_log({**line, "seconds": round(time.monotonic() - begin, 3)})
                if tracker:
                    tracker.log({name: value for name, value in line.items() if name != "step"}, done.number)
                last = done.number == c.steps or 0 < c.budget <= calls
                if self.watcher and (last or done.number % c.watch.every == 0):
                    self._look()
                    if tracker:
                        tracker.log({f"watch/{name}": value for name, value in self.watcher.points[-1].items()}, done.number)
                    last = last or self.watcher.over
                if last or done.number % c.save_every == 0:
                    self.save()
                yield done
                if last:
                    break
            if tracker:
                tracker.close()
            self.finish()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _write_log(self, line: Mapping[str, Any]) -> None:
        if not self.processes.main:
            return
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}; what was saved before is intact") from error

    @property
    def result(self) -> Path:
        """Where the LoRA goes, or the differences of a full fine-tune."""
        return self.folder / ("delta.safetensors" if self.config.tune == "full" else "lora.safetensors")

    def finish(self) -> Path:
        """Write the result with everything that says where it came from."""
        if self.processes.main:
            self._write_result(self.result)
        self.processes.exchange(None)
        return self.result

    def _write_result(self, path: Path) -> None:
        weights = self.ema.values if self.ema else None
        if self.config.tune == "full":
            save_delta(cast(Adaptable, self.policy), path, self.metadata(), weights, getattr(torch, self.config.delta_dtype))
        else:
            save_lora(self.policy, path, self.metadata(), weights)

    def _look(self) -> None:
        """A point of the watch; the adapter is kept where it is the best so far."""
        assert self.watcher is not None
        if self.processes.main or self.processes.sharded:  # nobody draws alone where all hold a part of the weights
            self._judge(self.watcher)
        self.watcher.points = self.processes.exchange(self.watcher.points)[0]  # so that all agree on whether it is over

    def _judge(self, watcher: Watcher) -> None:
        with self._averaged():
            point = watcher.look(self.step)
        if not self.processes.main:
            return
        log.info("watched: %s", ", ".join(f"{name} {value:.3f}" for name, value in point.items()))
        checkpoint.write_text(json.dumps(watcher.points, indent=1) + "\n", self.folder / "watch.json")
        if watcher.best is point:
            self._write_result(self.folder / "best.safetensors")

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """Inside, the adapter is what would be saved now: its moving average where there is one."""
        if self.ema is None:
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.policy.named_parameters()}
        self._write(self.ema.values)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.policy.named_parameters():
            parameter.copy_(values[name])

    def metadata(self) -> dict[str, Any]:
        """What the LoRA file says of itself; the switch is what `--switch auto` uses."""
        from importlib.metadata import PackageNotFoundError, version

        versions = {"torch": str(torch.__version__)}
        for package in ("diffusers", "peft"):  # a graph has neither
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        sigmas = self.policy.sigmas(self.objective.steps)
        return {
            "base": self.base_hash,
            "settings": self.config.describe(),
            "step": self.step,
            "switch_sigma": self.objective.recommended_sigma(sigmas),
            "tuned_guidance": self.objective.guidance_scale,
            "versions": versions,
        }
