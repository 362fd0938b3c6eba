"""Prompts as what a ComfyUI model wants to know of them, encoded once, and evaluated together where their shapes allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from .autograd import ordinary

Conditioning = list[tuple[Tensor, dict[str, Any]]]
Conds = dict[str, Any]
"""ComfyUI's conds of one prompt, by the argument of the network."""
# What a conditioning says of where, when and with what it counts, and what means always
_PLACED = {
    **dict.fromkeys(("area", "mask", "control", "gligen", "hooks")),
    "start_percent": 0.0,
    "end_percent": 1.0,
}
_KEPT = 64  # prompts on the device: those of a captioned folder may be thousands


def placed(conditioning: Iterable[tuple[Tensor, dict[str, Any]]]) -> list[str]:
    """The keys by which a conditioning counts for a part of the image or of the steps, or with another model's help."""
    return sorted({key for _, about in conditioning for key in _PLACED if about.get(key) not in (None, _PLACED[key])})


class Prompts:
    """The conditioning of each prompt of a MODEL; `condition` encodes one."""

    def __init__(self, model: Any, condition: Callable[[str], Conditioning], device: torch.device) -> None:
        self.model, self.condition, self.device = model, condition, device
        self.encoded: dict[str, list[dict[str, Any]]] = {}
        self.conds: dict[tuple[Any, ...], Conds] = {}  # on the device, by prompt and size of the latents: SDXL's depend on it

    @torch.no_grad()
    def prepare(self, prompt: str) -> list[dict[str, Any]]:
        """A prompt's conditioning, encoded once; call it for all prompts while the text encoder is loaded."""
        if prompt not in self.encoded:
            given = self.condition(prompt)
            if keys := placed(given):
                raise ValueError(f"the conditioning has {', '.join(keys)}, which training does not heed: connect a plain prompt")
            copied = [[ordinary(cond), {k: ordinary(v) for k, v in extra.items()}] for cond, extra in given]
            self.encoded[prompt] = comfy.sampler_helpers.convert_cond(copied)
        return list(self.encoded[prompt])

    def alike(self, prompt: str, other: str) -> bool:
        """Whether the text encoder gives two prompts the same tensors."""
        one, two = ([c for cond in self.prepare(p) for c in (cond["cross_attn"], cond.get("pooled_output"))] for p in (prompt, other))
        return len(one) == len(two) and all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, two))

    def grouped(self, prompts: Sequence[str], x: Tensor) -> list[tuple[list[int], dict[str, Any]]]:
        """The rows of `prompts` that one evaluation can take together, and the network's arguments for them.

        Text encoders that do not pad (Z-Image) give prompts of different lengths, which ComfyUI does not join either.
        """
        groups: list[tuple[list[int], list[Conds]]] = []
        while len(self.conds) > _KEPT:
            self.conds.pop(next(iter(self.conds)))
        for i, prompt in enumerate(prompts):
            conds = self._conds_of(prompt, x)
            rows, members = next((g for g in groups if _fit(g[1][0], conds)), ([], []))
            if not rows:
                groups.append((rows, members))
            rows.append(i)
            members.append(conds)
        return [(rows, {key: cond.concat([m[key] for m in members[1:]]) for key, cond in members[0].items()}) for rows, members in groups]

    def _conds_of(self, prompt: str, x: Tensor) -> Conds:
        key = (prompt, *x.shape[2:])
        if key not in self.conds:
            conds = comfy.samplers.encode_model_conds(self.model.extra_conds, self.prepare(prompt), x[:1].detach(), self.device, "positive")
            if len(conds) != 1:
                raise ValueError(f"the conditioning of {prompt!r} has {len(conds)} parts: training takes one plain prompt")
            whole = conds[0]["model_conds"]
            self.conds[key] = {k: c.process_cond(batch_size=1, device=self.device, area=None) for k, c in whole.items()}
        return self.conds[key]


def _fit(a: Conds, b: Conds) -> bool:
    return a.keys() == b.keys() and all(cond.can_concat(b[key]) for key, cond in a.items())
