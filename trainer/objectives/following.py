"""An average of the trained weights that follows them: a teacher, or the policy that drew a run's samples."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, WrappedDenoiser
from ..policy import Policy


class Following:
    """Values v of the trained parameters p, v ← decay·v + (1 − decay)·p; `inside` evaluates the model with v in place of p.

    No network and no adapter is copied. Equal in all processes, whose parameters are.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self._values = policy, list[Tensor]()

    @property
    def values(self) -> list[Tensor]:
        """v, of the parameters when they are first asked for: an adapter may be attached after a loss has begun."""
        if not self._values:
            self._values = [p.detach().clone() for p in self.policy.parameters()]
        return self._values

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Follow the parameters: 0 copies them."""
        for value, parameter in zip(self.values, self.policy.parameters()):
            value.lerp_(parameter.detach().to(value), 1 - decay)

    @contextmanager
    def inside(self) -> Generator[None]:
        """Evaluations without gradient by the values that follow; the parameters are back afterwards."""
        with torch.no_grad():
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def _exchange(self) -> None:
        values = self.values
        for i, parameter in enumerate(self.policy.parameters()):
            parameter.data, values[i] = values[i], parameter.data

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"values": [value.cpu().clone() for value in self.values]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` returned."""
        self._values = [kept.to(p.detach()) for kept, p in zip(state["values"], self.policy.parameters(), strict=True)]


class WithFollowing:
    """A policy whose adapter `name` is the trained parameters as they followed."""

    def __init__(self, policy: Policy, following: Following, name: str) -> None:
        self.policy, self.following, self.name = policy, following, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", **settings: Any) -> Denoiser:
        """The policy's."""
        if adapter != self.name:
            return self.policy.denoiser(prompts, adapter=adapter, **settings)
        return WrappedDenoiser(self.policy.denoiser(prompts, **settings), self._inside)

    def _inside(self, denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        with self.following.inside():
            return denoiser(x, sigma)
