"""TPO: captioned images alone, each under its caption and under one that is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ..base import Bound, Logs, Loss, RunContext
from ..shared import in_order
from .dpo import pair_losses, safeguard
from .errors import DenoisingObjective, mean_square
from .kto import label_losses
from .perturb import perturb, read_perturbed


@dataclass(frozen=True)
class TPO(DenoisingObjective):
    """Text preference optimisation (TPO, Xian et al. 2025, arXiv:2509.25771): an image under its caption and under a wrong one.

    `dpo` is TDPO, with the safeguard in place of the authors' clipped gradient of the wrong caption; `kto` is TKTO. Wrong captions have
    one word changed by rule; the authors have a language model write them. Written from the paper: its code is not public, and β is
    Diffusion-DPO's and Diffusion-KTO's.
    """

    form: Literal["dpo", "kto"] = field(default="dpo", metadata={"help": "loss on the two captions: as a pair, or as liked and disliked"})
    beta: float = field(default=5000.0, metadata={"min": 0.0, "help": "as in Diffusion-DPO, 5000, or with kto as in Diffusion-KTO, 1000"})
    mu: float = field(default=0.9, metadata={"min": 0.0, "max": 1.0, "help": "of the safeguard (dpo): share of progress kept"})
    captions_file: str = field(
        default="", metadata={"help": "CSV or JSONL with columns prompt and perturbed; other captions are changed by rule"}
    )

    @property
    def data(self) -> type[Prompts]:
        """Images."""
        return Images

    def perturbed(self, prompts: Sequence[str]) -> dict[str, str | None]:
        """The wrong caption of each prompt; None where no rule changes it."""
        given = read_perturbed(Path(self.captions_file)) if self.captions_file else {}
        return {prompt: given.get(prompt) or perturb(prompt) for prompt in prompts}

    def captions(self, prompts: Sequence[str]) -> list[str]:
        """Right and wrong ones."""
        return [*prompts, *(wrong for wrong in self.perturbed(prompts).values() if wrong)]

    def check(self, context: RunContext) -> None:
        """Refuse captions that cannot be perturbed, or whose perturbed versions the model does not tell from them."""
        captions = self.perturbed(context.prompts)
        if self.captions_file and not read_perturbed(Path(self.captions_file)).keys() & captions.keys():
            raise ValueError(
                f"objective.captions_file = {self.captions_file}: it has none of the captions, which must be equal to the letter"
            )
        same = [prompt for prompt, wrong in captions.items() if wrong is None]
        if same:
            raise ValueError(f"no rule changes the caption {_first(same)}: give wrong captions in objective.captions_file")
        alike = [prompt for prompt, wrong in captions.items() if wrong and context.policy.reads_alike(prompt, wrong)]
        if alike:
            raise ValueError(
                f"the model reads the caption {_first(alike)} and its wrong version alike: they differ beyond its last token, or in case; "
                "give shorter captions, or other wrong ones in objective.captions_file"
            )

    def of_run(self, context: RunContext) -> Loss:
        """The loss of one run, which a resumed one must share the wrong captions of."""
        return _WithCaptions(self, context)

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Images):
            raise ValueError("captions are compared on images: give `images`")
        noised, right, changed = self.noised(run, batch), self.kept(batch, batch.prompts), self.perturbed(batch.prompts)
        wrong = [(changed.get(prompt) or prompt) if kept else "" for prompt, kept in zip(batch.prompts, right)]
        latents = batch.latents, batch.latents
        tuned, reference = noised.two(latents, (right, wrong)), noised.two(latents, (right, wrong), "base")
        error = mean_square(tuned[0])
        if self.form == "dpo":
            losses, logs = pair_losses(tuned, reference, self.beta, rejected_scale=safeguard(tuned, self.mu, run.processes))
            return (losses + self.sft_weight * error).mean(), logs
        gain = torch.cat([mean_square(theirs) - mean_square(ours) for ours, theirs in zip(tuned, reference)])
        liked = torch.arange(len(gain), device=gain.device) < len(error)
        losses, logs = label_losses(gain, liked, self.beta, (1.0, 1.0), run.processes)
        good, bad = logs["gain"].chunk(2)
        shown = {"margin": good - bad, "accuracy": in_order(good - bad), "error": error.detach()}
        return losses.mean() + self.sft_weight * error.mean(), shown


def _first(captions: Sequence[str]) -> str:
    more = f" (and {len(captions) - 1} more)" if len(captions) > 1 else ""
    return f"{captions[0] if len(captions[0]) <= 60 else captions[0][:57] + '…'!r}{more}"


class _WithCaptions(Bound):
    """The loss of a run that remembers its wrong captions."""

    def state(self) -> dict[str, Any]:
        """A hash of the wrong captions."""
        changed = cast(TPO, self.objective).perturbed(self.run.prompts)
        return {"captions": hashlib.sha256(repr(sorted(changed.items())).encode()).hexdigest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Refuse a run that began with other wrong captions."""
        if state != self.state():
            raise ValueError("objective.captions_file holds other captions than when the run began: go on with those")
