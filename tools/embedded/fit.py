"""Optimisation of one stage of pretraining: AdamW on a loss of the step, moving averages, and exact resume."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.demo import architecture
from trainer.runtime.processes import ALONE, Processes
from trainer.training import checkpoint

log = logging.getLogger(__name__)

DECAY = 0.35  # share of a stage's steps over which the learning rate falls to zero
LATENT_NOISE = 0.08  # standard deviation that the decoder learns to forgive, in units of the latents' own


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator that depends on (seed, purpose) alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *purpose)).encode()))


class Average:
    """Exponential moving average of a module's parameters; the early steps are averaged over fewer."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.state_dict().items():
            if p.is_floating_point():
                self.values[name].lerp_(p, 1 - decay)


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    work: Path,
    decay: float = 0.999,
    weight_decay: float = 0.0,
    warmup: int = 200,
    save_every: int = 500,
    processes: Processes = ALONE,
) -> Average:
    """Adam with warm-up, a plateau and a linear decay over the last DECAY of steps, on `loss_at(step)`; returns the averaged weights.

    State lives in `work/name.pt`, losses in `work/name.jsonl`.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average, done, path = Average(module, decay), 0, work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        average.values = state["average"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        log.info("%s: resumed at step %d of %d", name, done, steps)
    begin, recent = time.monotonic(), []
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup, (steps - step) / (DECAY * steps))
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(module, step)
        recent.append(float(loss.detach()))
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"{name}: loss {recent[-1]} at step {step}")
        if not processes.main:
            continue
        if (step + 1) % 100 == 0 or step + 1 == steps:
            line = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds": round(time.monotonic() - begin, 1)}
            with open(work / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s %s", name, line)
            recent = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"module": module.state_dict(), "average": average.values, "step": step + 1}
            checkpoint.save(state if step + 1 == steps else {**state, "optimizer": optimizer.state_dict()}, path)
    return average


def load_stage(work: Path, name: str, module: nn.Module) -> Any:
    """The averaged weights that a stage has so far, frozen."""
    state = torch.load(work / f"{name}.pt", weights_only=True)
    module.load_state_dict(state["average"])
    return module.requires_grad_(False).eval()


class TextToLatent(nn.Module):
    """The two networks that the UNet stage trains together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = architecture.build_unet(), architecture.build_text_encoder()
