"""The training loop: a generator that yields after each optimizer step. It knows no objective, model or file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..runtime.processes import ALONE, Processes


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number (1 after the first), mean loss, gradient norm before clipping, mean logs."""

    number: int
    loss: float
    grad_norm: float
    logs: dict[str, float]


class NonFinite(FloatingPointError):
    """A loss or gradient is not finite; no step was taken."""


def train(
    loss: Callable[[Batch], tuple[Tensor, Mapping[str, Tensor]]],
    batches: Callable[[int, int], Batch],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    start: int = 0,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    learning_rate: Callable[[int], float] | None = None,
    processes: Processes = ALONE,
) -> Iterator[Step]:
    """Yield after each of the optimizer steps start+1 … steps.

    loss(batch) returns a loss () and logs of (B,) by name; its gradient trains `parameters`. batches(step, micro) returns
    micro-batch `micro` of `accumulate`, over which gradients are averaged. max_grad_norm 0 does not clip; learning_rate(step)
    overrides the optimizer's. With several processes each one gets an equal share of every batch, and gradients, loss and logs
    are means over them. Raises NonFinite before a bad gradient is applied.
    """
    for number in range(start, steps):
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number)
        optimizer.zero_grad(set_to_none=True)
        total, figures = 0.0, dict[str, list[float]]()
        for micro in range(accumulate):
            batch = batches(number, micro)
            value, logs = loss(batch)
            amount = float(value.detach())
            if not math.isfinite(amount):
                raise NonFinite(_diagnosis(number, batch, logs))
            (value / accumulate).backward()
            total += amount / accumulate
            for name, values in logs.items():
                figures.setdefault(name, []).append(float(values.float().mean()))
        everyone = processes.exchange((total, {name: _mean(values) for name, values in figures.items()}))
        total, means = _mean([t for t, _ in everyone]), {name: _mean([m[name] for _, m in everyone]) for name in figures}
        processes.average_gradients(parameters)
        norm = gradient_norm(parameters)
        if not math.isfinite(norm):
            raise NonFinite(f"step {number + 1}: the gradient is not finite; lower the learning rate, or train in fp32")
        if max_grad_norm > 0 and norm > max_grad_norm:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(max_grad_norm / norm)
        optimizer.step()
        yield Step(number + 1, total, norm, means)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Euclidean norm of all gradients together."""
    norms = [p.grad.float().norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _diagnosis(number: int, batch: Batch, logs: Mapping[str, Tensor]) -> str:
    for name, values in logs.items():
        bad = (~values.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            sample, prompt = batch.rng.indices[bad[0]], batch.prompts[bad[0]]
            return (
                f"step {number + 1}: {name} of sample {sample} ({prompt!r}) is not finite; "
                "lower the learning rate or max_grad_norm, or check that image; no step was taken"
            )
    return f"step {number + 1}: the loss is not finite; lower the learning rate; no step was taken"


class Ema:
    """Exponential moving average of the adapter; decay 0 keeps none."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in named}

    @torch.no_grad()
    def update(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """values ← decay·values + (1−decay)·parameters."""
        for name, parameter in named:
            self.values[name].lerp_(parameter, 1 - self.decay)
