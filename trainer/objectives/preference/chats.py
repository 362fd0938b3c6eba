"""CHATS: a model of the better and one of the worse images of pairs, which guide each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...data.batches import Batch, Pairs, Prompts
from ...guidance import Mix, Slot
from ...guides import by_loser
from ...policy import with_companions
from ..base import Logs, RunContext
from .errors import DenoisingObjective, mean_square


@dataclass(frozen=True)
class CHATS(DenoisingObjective):
    """CHATS (Fu et al. 2025, arXiv:2502.12579): two LoRAs on one model, a winner that learns better images and a loser that learns worse.

    Loss −logσ(−β·[(L_winner − L_base of the better image) + (L_loser − L_base of the worse)]): both lower the error of their own image.
    Images are drawn by the guide `chats`, winner(c) + s·(winner(c) − loser(c̃)). Loss and defaults are those of the official code: β = 1000,
    half of the loser's prompts empty (there zeros, which is the empty prompt of SDXL alone), full weights, 128 pairs a step, 6000 steps
    (SDXL) and 2000 (SD1.5).
    """

    companions: ClassVar[tuple[str, ...]] = ("loser",)
    may_follow: ClassVar[bool] = False  # two models follow two
    guidance_scale: float = field(
        default=5.0, metadata={"min": 0.0, "max": 30.0, "help": "scale s of evaluations, counted from 0; training has no guidance"}
    )
    beta: float = field(default=1000.0, metadata={"min": 0.0, "help": "how soon a pair counts as learnt; 0 learns nothing"})
    loser_dropout: float = field(
        default=0.5, metadata={"min": 0.0, "max": 1.0, "help": "share of the worse images that are trained under the empty prompt"}
    )
    proxy: float = field(
        default=0.5,
        metadata={"min": -1.0, "max": 10.0, "help": "of evaluations: strength α of the loser's prompt (1 + α)·empty − α·prompt"},
    )

    @property
    def data(self) -> type[Prompts]:
        """Pairs."""
        return Pairs

    @property
    def guide(self) -> str:
        """That of two models."""
        return "chats"

    def mix(self, tuned: Slot, sigmas: Tensor) -> Mix:
        """The winner, guided by the loser."""
        _, loser = with_companions(tuned.adapter, self.companions)
        return by_loser(tuned, loser, self.proxy, sigmas)

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Pairs):
            raise ValueError("preferences are learnt from pairs of images: give `pairs`")
        noised, (better, worse) = self.noised(run, batch), self.read(batch, 2)
        empty = (batch.rng.uniform("loser's prompt dropout") < self.loser_dropout).tolist()
        worse = ["" if gone else prompt for gone, prompt in zip(empty, worse)]
        errors, gains = list[Tensor](), list[Tensor]()
        learnt = zip(with_companions("tuned", self.companions), (batch.chosen, batch.rejected), (better, worse))
        for number, (adapter, latents, prompts) in enumerate(learnt):
            error, base = (mean_square(noised.of(number).errors([latents], [prompts], one)[0]) for one in (adapter, "base"))
            errors.append(error)
            gains.append(base - error)
        losses = -F.logsigmoid(self.beta * (gains[0] + gains[1])) + self.sft_weight * errors[0]
        logs = {"winner_gain": gains[0], "loser_gain": gains[1], "chosen_error": errors[0], "rejected_error": errors[1]}
        return losses.mean(), {name: value.detach() for name, value in logs.items()}
