"""What policy gradients share: rounds of images, their scores and advantages.

A round draws `group` images of each of `prompts_per_round` prompts, scores them and compares them. Rewards are never differentiated.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...reward import SummedReward
from ...rng import Rng
from ..base import Logs, Loss, RunContext
from .advantages import HISTORY, LEAST, Baseline, History, above_auxiliaries, equal, group_advantages, relative_distances
from .collecting import Collected, Collecting
from .scoring import Scoring
from .selection import Round, Selection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyGradient(Collecting):
    """Rounds of rollouts. A subclass says which steps it trains, how it draws, and the losses of a part."""

    baseline: Baseline = field(
        default="group",
        metadata={
            "help": "(score − mean) / standard deviation: group: of the prompt's images; group-mean: mean of these, standard deviation "
            f"of the round; round: of all images; history: of the prompt's last {HISTORY}"
        },
    )
    max_advantage: float = field(
        default=5.0, metadata={"min": 1e-3, "max": 1000.0, "help": "advantages are clipped to ± this (official 5)"}
    )
    kl_weight: float = field(
        default=0.0, metadata={"min": 0.0, "help": "weight of the distance to the base model, one more evaluation; 0 is off"}
    )

    separate_rewards: bool = field(
        default=False, metadata={"help": "of a sum of rewards: each has advantages of its own, which are added by weight"}
    )
    gate: float = field(
        default=0.0,
        metadata={
            "min": 0.0,
            "max": 1.0,
            "help": "kl_weight counts for this share of the images that the reward ranks above what auxiliary rewards do, those of "
            "weight 0 in its sum (GARDO); 0: for all images",
        },
    )
    diversity_weighted: bool = field(
        default=False,
        metadata={"help": "advantages above 0 are multiplied by the distance to the group's nearest image in `features` (GARDO)"},
    )

    def __post_init__(self) -> None:
        if self.separate_rewards and self.baseline == "history":
            raise ValueError("separate_rewards: baseline = history remembers one score of an image; choose group, group-mean or round")
        if self.gate > 0 and self.kl_weight == 0:
            raise ValueError(f"gate = {self.gate:g} chooses what kl_weight counts for: give a kl_weight above 0")
        if self.group < 2 and self.baseline in ("group", "group-mean"):
            raise ValueError(
                f"group = {self.group}: an image is compared with others of its prompt; give at least 2, or baseline = round or history"
            )
        if self.images < 2:
            raise ValueError("group · prompts_per_round = 1 image: give at least 2, which are compared")

    @property
    def images(self) -> int:
        """N, the images of a round."""
        return self.group * self.prompts_per_round

    @property
    def rollouts(self) -> int:
        """Images."""
        return self.images

    def check(self, context: RunContext) -> None:
        """As all; and refuse options that this run has no rewards or features for."""
        reward, sums = context.reward, isinstance(context.reward, SummedReward)
        if self.separate_rewards and not sums:
            raise ValueError('separate_rewards: give a sum of rewards, such as "hpsv2.1=1, pickscore=0.5"')
        if self.gate > 0 and not (isinstance(reward, SummedReward) and 0 in reward.weights and any(reward.weights)):
            raise ValueError('gate: give auxiliary rewards, which are those of weight 0 in a sum, such as "hpsv2.1=1, pickscore=0"')
        if self.diversity_weighted and context.features is None:
            raise ValueError(
                "diversity_weighted: give `features`, a two-tower reward in whose features images are compared (clip-l14, say)"
            )
        super().check(context)

    @abstractmethod
    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rollouts of B prompts with trained steps index (B,W): states (B,K,C,h,w), ends (E·B,C,h,w), log-probabilities (B,W).

        first: the least index of the round's trained steps, at which a stretch of states begins. E: ends of one rollout, usually 1, which
        come one after another: B first ones, B second ones. A rollout's advantage is the sum of its ends'.
        """

    @abstractmethod
    def losses(self, run: RunContext, part: Selection) -> tuple[Tensor, Logs]:
        """Losses (B,) and logs of (B,) of a micro-batch."""

    def begin(self, context: RunContext) -> Loss:
        """A run's loss, which owns the present round."""
        return Rounds(self, context)


class Rounds(Collected[PolicyGradient, Round]):
    """The rounds of one run."""

    def __init__(self, objective: PolicyGradient, run: RunContext) -> None:
        super().__init__(objective, run)
        self.history = History()

    def _loss(self, rng: Rng, present: Round, rollout: Tensor, turn: Tensor) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        o = self.objective
        losses, logs = o.losses(self.run, self._part(rng, present, rollout, turn))
        size = present.advantages.abs()
        idle = size.reshape(-1, o.group).amax(1) == 0
        shown = {"reward": present.scores[rollout], "advantage size": size[rollout], "no advantage": idle[rollout // o.group].float()}
        return losses.mean(), {**logs, **shown}

    @property
    def scoring(self) -> Scoring:
        """What images are asked for."""
        return Scoring(self.run, self.objective.separate_rewards or self.objective.gate > 0, self.objective.diversity_weighted)

    def _part(self, rng: Rng, present: Round, image: Tensor, turn: Tensor) -> Selection:
        """The samples of images and turns (B,)."""
        prompts, index = self._chosen(rng.seed, present.number)
        return Selection(
            tuple(prompts[i] for i in image.tolist()),
            rng,
            self._states(index, image, turn),
            index[image, turn],
            present.advantages[image],
            None if rng.step == present.step else present.log_probs[image, turn],
            present.held[image].float(),
        )

    @torch.no_grad()
    def _collect(self, rng: Rng, number: int, chunk: int) -> Round:
        """Draw and score the images of a round, `chunk` at a time; processes share them, and each compares all."""
        o, run = self.objective, self.run
        prompts, index = self._chosen(rng.seed, number)

        def draw(part: Sequence[str], seeds: Rng, rows: range) -> tuple[Tensor, ...]:
            states, ends, log_probs = o.draw(run, part, seeds, index[rows.start : rows.stop], int(index.min()))
            scored = [self.scoring(run.policy.decode(some), part) for some in ends.split(len(part))]
            terms, features = torch.stack([terms for terms, _ in scored], 1), scored[0][1]
            return states, log_probs.cpu(), terms.float().cpu(), features.float().cpu()

        log_probs, terms, features = self._drawn(rng, number, chunk, draw)
        weights = torch.tensor(self.scoring.weights)
        by_end = (terms * weights).sum(2)
        scores = by_end.mean(1)
        held = torch.ones(len(scores), dtype=torch.bool)
        if o.gate > 0:
            held = above_auxiliaries(scores, terms[:, :, weights == 0].flatten(1), o.gate)
        apart = (terms.flatten(1), weights.repeat(terms.shape[1])) if o.separate_rewards else (by_end, torch.ones(by_end.shape[1]))
        advantages = self._advantages(prompts, scores, *apart)
        if o.diversity_weighted:
            distances = relative_distances(features.reshape(-1, o.group, features.shape[1])).flatten().to(advantages)
            advantages = torch.where(advantages > 0, advantages * distances, advantages)
        return Round(number, rng.step, scores, advantages.clamp(-o.max_advantage, o.max_advantage), log_probs, held)

    def _advantages(self, prompts: Sequence[str], scores: Tensor, terms: Tensor, weights: Tensor) -> Tensor:
        """Advantages (N,) of terms (N,A), each compared by itself, by weights (A,); scores (N,) are what they sum up to."""
        o = self.objective
        if not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(
                f"the reward of an image of {prompts[bad]!r} is {float(scores[bad])}: no advantage can be taken; check the reward"
            )
        if o.baseline == "history":
            found = self.history.advantages(prompts, scores)
        else:
            each = [group_advantages(values.reshape(-1, o.group), o.baseline).flatten() for values in terms.T]
            found = (torch.stack(each, 1) * weights).sum(1)
        said, spread = "", float(scores.std(correction=0))
        if not bool(found.any()):
            same = f"all {len(scores)} images of the round have the reward {float(scores[0]):g}"
            said = f"{same if equal(scores) else 'the images of each prompt have one reward'}, and no advantage over each other"
        elif spread < LEAST:
            said = f"rewards of the round have a standard deviation of {spread:.2g}, and hardly an advantage: {LEAST:g} is added to it"
        if said and self.run.policy.device.type != "meta":  # a plan's scores have no values
            if self.round is None:
                raise ValueError(f"{said}; choose a reward that tells them apart, or a larger unit, more steps or images")
            log.warning("%s", said)
        return found

    def _restored(self, values: Mapping[str, Any]) -> Round:
        return Round(**values)

    def state(self) -> dict[str, Any]:
        """The round, its list of files and the scores of earlier ones."""
        found = super().state()
        return {**found, "history": self.history.scores} if found else found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        super().restore(state)
        if state:
            self.history.scores = dict(state["history"])
