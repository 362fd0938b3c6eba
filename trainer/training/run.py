"""Training from a config to a LoRA file, with log, checkpoints, evaluations and exact resume."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock

from ..config import ConfigError
from ..data.batches import Batch
from ..lora.file import save_delta, save_lora
from ..policy import Adaptable, Policy
from ..runtime.device import peak_gb
from ..runtime.files import write_text
from . import checkpoint, folder
from .config import TrainConfig
from .evaluation import Point, best_point, is_owed, over_optimised
from .external import Before, or_saved, saving
from .loop import Ema, Step, train
from .nfe import CountingPolicy
from .optimizers import build_optimizer
from .parts import Parts, check_settings, prepare
from .tracker import Tracker

log = logging.getLogger(__name__)


class Run:
    """A training run and its folder: `config.json`, `log.jsonl`, `checkpoint.pt`, `lora.safetensors` (`delta.safetensors` with
    tune = full), snapshots; with a watch also `watch.json` and `best.safetensors`. Beside each of these lie LoRAs of its companions.

    Several processes share every micro-batch; together they take the samples that one process would take, so their number changes
    no setting, no draw and no file, and a run may resume with another number. The main process writes, all of them read.
    """

    def __init__(self, config: TrainConfig, parts: Parts, lock: FileLock | None = None) -> None:
        """Adapter, loss, optimizer and EMA at step 0; `start` also checks the settings and opens the folder."""
        self.config, self.samples, self.reward, self.bases = config, parts.samples, parts.reward, parts.bases
        self.weights = {key: dict(hashes) for key, hashes in parts.weights.items()}
        self.data = {key: dict(found) for key, found in parts.data.items()}
        self.policy, self.evaluation, self.processes = parts.policy, parts.evaluation, parts.processes
        self.counted, self.folder, self._lock = CountingPolicy(parts.policy), Path(config.out), lock
        self.context = parts.context(config, cast(Policy, self.counted))
        self.loss = config.method.begin(self.context)
        try:
            prepare(parts.policy, config, parts.processes)
            self.optimizer = build_optimizer(config.optimizer, parts.policy.parameters(), config.learning_rate, config.weight_decay)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        self.ema = Ema(self.policy.named_parameters(), config.ema) if config.ema > 0 else None
        self.step = 0
        self.shared_draws = "micro-batch"
        """What has one draw where all samples share it; `step`, the optimizer step, in runs that 0.1.0 started."""
        self.last = False
        """Whether the step that was yielded last ends the run."""

    @classmethod
    def start(cls, config: TrainConfig, parts: Parts, *, overwrite: bool = False, resume: bool = False) -> Run:
        """A run at its first step, or at that of its checkpoint; ConfigError where settings, parts or folder do not allow it."""
        check_settings(config, parts)
        run = cls(config, parts)
        run.open_folder(overwrite=overwrite, resume=resume)
        return run

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """The resumable state."""
        return self.folder / folder.CHECKPOINT

    @property
    def result(self) -> Path:
        """The LoRA, or the differences of full fine-tuning."""
        return self.folder / ("delta.safetensors" if self.config.tune == "full" else "lora.safetensors")

    def open_folder(self, *, overwrite: bool, resume: bool) -> None:
        """Create and lock the folder, or resume from it; ConfigError where it holds a run already, or none to resume."""
        if resume:
            folder.check_folder(self.folder, overwrite=False, resume=True)  # in every process, so that the error is reported once
        if self.processes.main:
            self._lock = self._lock or folder.claim(self.folder, overwrite=overwrite, resume=resume)
        if resume:
            self.load()
        if self.processes.main:
            folder.check_room(self.config, self.step, self._result_bytes())
            if not resume:
                folder.clear(self.folder)
            # on resume NEUTRAL settings may be new
            folder.write_config(self.config, self.folder)
        self.processes.exchange(None)

    def save(self, before: Before | None = None) -> None:
        """Write the checkpoint. All processes call this, at the same step."""
        spent = self._spent() if before is None else before[1]
        if self.processes.main:
            checkpoint.save(self._state(spent) | ({} if before is None else {"objective": before[0]}), self.checkpoint_path)
            if before is None:
                self.loss.saved()
        self.processes.exchange(None)

    def _spent(self) -> dict[str, int]:
        """What the log says of calls and images, of all processes."""
        every = self.processes.exchange(self.counted.spent)
        return {name: sum(one[name] for one in every) for name in every[0]}

    def _state(self, spent: Mapping[str, int]) -> dict[str, Any]:
        return {
            "step": self.step,
            "adapter": {name: p.detach() for name, p in self.policy.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.values if self.ema else {},
            "objective": self.loss.state(),
            "points": self.evaluation.points if self.evaluation else [],
            **spent,
            "shared_draws": self.shared_draws,
            "settings": json.dumps(self.config.describe(), sort_keys=True),
            "base": self.bases[0],
            "weights": self.weights,
            "data": self.data,
        }

    def load(self) -> None:
        """Restore the checkpoint; ConfigError where it belongs to other settings, weights or data."""
        state = checkpoint.load(self.checkpoint_path)
        folder.check_resumable(self.config, state, self.bases, self.weights, self.data, dict(self.policy.named_parameters()))
        self.shared_draws = state.get("shared_draws", "step")
        if self.shared_draws == "step" and self.config.gradient_accumulation_steps > 1:
            log.warning(
                "%s is of an earlier version: as there, all micro-batches of an optimizer step share one draw", self.checkpoint_path
            )
        self._write(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.values = {k: state["ema"][k].to(v.device) for k, v in self.ema.values.items()}
        self.loss.restore(state["objective"])
        if self.evaluation:
            self.evaluation.points = state["points"]
        self.step = state["step"]
        self.last = self._ends(state["calls"])
        if self.processes.main:
            self.counted.spent = state
            folder.trim_log(self.folder, self.step)

    def _ends(self, calls: int) -> bool:
        """Whether `steps`, `budget` or the watch ends the run at this step."""
        c = self.config
        if self.step == c.steps or 0 < c.budget <= calls:
            return True
        return self.evaluation is not None and over_optimised(self.evaluation.points, c.watch.diversity, c.watch.patience)

    # -- training ------------------------------------------------------------------------------------------------

    def batches(self, step: int, micro: int) -> Batch:
        """This process's share of micro-batch `micro` of optimizer step `step`."""
        number = step * self.config.gradient_accumulation_steps + micro
        share = self.processes.share(self.config.batch_size)
        batch = self.samples.batch(self.config.seed, step, number, self.config.batch_size, share)
        return batch if self.shared_draws == "micro-batch" else replace(batch, rng=replace(batch.rng, batch=None))

    def steps(self) -> Iterator[Step]:
        """Train until `steps`, `budget` or the watch ends it, logging each step and saving every `save_every`.

        A step that is not finite raises NonFinite and saves nothing: the last checkpoint stays good.
        """
        c, begin = self.config, time.monotonic()
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.release)
            tracker = Tracker(c.tracker, self.folder) if c.tracker and self.processes.main else None
            if tracker:
                stack.callback(tracker.close)
            if self.evaluation and is_owed(self.evaluation.points, self.step, c.watch.every, self.last):
                self._evaluate(None)  # before training: the reference of `watch.diversity`
                self.last = self.last or self._ends(self._spent()["calls"])
            # a kill may leave the last checkpoint without its result
            for done in () if self.last else or_saved(self, self._optimizer_steps()):
                self.step = done.number
                if self.ema:
                    self.ema.update(self.policy.named_parameters())
                spent = self._spent()
                self._log(done, spent, time.monotonic() - begin, tracker)
                self.last = self._ends(spent["calls"])
                if self.evaluation and (self.last or done.number % c.watch.every == 0):
                    self._evaluate(tracker)
                    self.last = self._ends(spent["calls"])
                if c.snapshot_every and done.number % c.snapshot_every == 0 and self.processes.main:
                    self._write_result(folder.snapshot(self.result, done.number))  # before the checkpoint: a resumed run has them all
                if self.last or done.number % c.save_every == 0:
                    self.save()
                yield done
                if self.last:
                    break
            self.finish()

    def _optimizer_steps(self) -> Iterator[Step]:
        c = self.config
        warmup = (lambda step: c.learning_rate * min(1.0, (step + 1) / c.lr_warmup_steps)) if c.lr_warmup_steps else None
        return train(
            self.loss,
            self.batches,
            list(self.policy.parameters()),
            self.optimizer,
            steps=c.steps,
            start=self.step,
            accumulate=c.gradient_accumulation_steps,
            max_grad_norm=c.max_grad_norm,
            learning_rate=warmup,
            processes=self.processes,
        )

    def _log(self, done: Step, spent: Mapping[str, int], seconds: float, tracker: Tracker | None) -> None:
        if not self.processes.main:
            return
        line = {"loss": done.loss, "grad_norm": done.grad_norm, **spent, **done.logs, "memory_gb": round(peak_gb(self.config.device), 3)}
        folder.append_log(self.folder, {"step": done.number, **line, "seconds": round(seconds, 3)})
        if tracker:
            tracker.log(line, done.number)

    # -- results -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the result with everything that says where it came from."""
        if self.processes.main:
            self._write_result(self.result)
        self.processes.exchange(None)

    def _write_result(self, path: Path) -> None:
        weights = self.ema.values if self.ema else None
        if self.config.tune == "full":
            save_delta(cast(Adaptable, self.policy), path, self.metadata(), weights, getattr(torch, self.config.delta_dtype))
            return
        for adapter, file in folder.files_of(path, self.config.method.companions).items():
            save_lora(self.policy, file, self.metadata() | ({"adapter": adapter} if file != path else {}), weights, adapter)

    def _result_bytes(self) -> int:
        """Size of the result's file, but for its header."""
        element = 2 if self.config.tune == "full" and self.config.delta_dtype == "bfloat16" else 4
        return element * sum(p.numel() for p in self.policy.parameters())

    @property
    def best(self) -> Point:
        """The evaluation of the best checkpoint; the first one where no other keeps enough diversity."""
        assert self.evaluation is not None
        return best_point(self.evaluation.points, self.config.watch.diversity)

    def _evaluate(self, tracker: Tracker | None) -> None:
        """Add an evaluation; write the weights where it is the best so far."""
        assert self.evaluation is not None
        if self.processes.main or self.processes.sharded:  # sharded, a forward needs all processes
            with saving(self), self._averaged():
                point = self.evaluation.run(self.step)
            if self.processes.main:
                log.info("evaluation: %s", ", ".join(f"{name} {value:.3f}" for name, value in point.items()))
                write_text(json.dumps(self.evaluation.points, indent=1) + "\n", self.folder / folder.WATCH)
                if self.best is point:
                    self._write_result(self.folder / folder.BEST)
                if tracker:
                    tracker.log({f"watch/{name}": value for name, value in point.items()}, self.step)
        self.evaluation.points = self.processes.exchange(self.evaluation.points)[0]  # so that all agree on when the run ends

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """Inside, the weights are those that would be saved now: the EMA where there is one."""
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
        """What the result's file records; `sample --switch auto` and the nodes take the switch from `switch_sigma`."""
        method = self.config.method
        return {
            "base": self.bases[0],
            "weights": self.weights,
            "settings": self.config.describe(),
            "step": self.step,
            "switch_sigma": method.recommended_sigma(self.policy.sigmas(method.steps)),
            "tuned_guidance": method.guidance_scale,
            **({"guide": method.guide} if method.guide else {}),
            "versions": folder.versions(),
        }
