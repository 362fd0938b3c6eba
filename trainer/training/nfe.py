"""What training costs, in a unit that does not depend on the machine: denoiser calls (NFE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser, WrappedDenoiser
from ..policy import Policy


class CountingPolicy:
    """A Policy that counts denoiser calls; the rest is the policy inside.

    A call is one image and forward, conditional and unconditional apart; a backward through it counts two more, and a
    recomputed forward counts again. `without_gradient` are those of them that no backward goes through: rollouts, references.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls = self.without_gradient = self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        adapter: str = "tuned",
        guidance_scale: float = 1.0,
        negative: str = "",
        prompt_weight: float = 1.0,
    ) -> Denoiser:
        """The policy's, counted."""
        inner = self.policy.denoiser(
            prompts, adapter=adapter, guidance_scale=guidance_scale, negative=negative, prompt_weight=prompt_weight
        )
        return self._counted(inner, adapter, guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """The policy's; images are counted."""
        self.decoded += len(latents)
        return self.policy.decode(latents)

    @property
    def spent(self) -> dict[str, int]:
        """What a log line says: all calls, those without a gradient, and the images decoded, which are those scored."""
        return {"calls": self.calls, "calls_without_gradient": self.without_gradient, "images_decoded": self.decoded}

    @spent.setter
    def spent(self, given: Mapping[str, int]) -> None:
        self.calls = given["calls"]
        self.without_gradient, self.decoded = given.get("calls_without_gradient", 0), given.get("images_decoded", 0)  # 0.2.0 has neither

    def _counted(self, denoiser: Denoiser, adapter: str, guidance_scale: float) -> Denoiser:
        def denoise(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
            each = len(x) * (1 if guidance_scale == 1 else 2)
            self.calls += each
            output = denoiser(x, sigma)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._backward(each))  # pyright: ignore[reportUnknownLambdaType]
            else:
                self.without_gradient += each
            return output

        return WrappedDenoiser(denoiser, denoise)

    def _backward(self, each: int) -> None:
        self.calls += 2 * each
