"""What policy gradients share: rounds of rollouts and scores, and micro-batches of what is trained of them.

A round draws `group` images of each of `prompts_per_round` prompts, scores them and compares them. Then its N images with W trained
steps each are N·W samples, which micro-batches take in a random order, `passes` times. Rewards are never differentiated.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data.batches import Batch
from ...policy import Policy
from ...reward import SummedReward
from ...rng import Rng, generator, seed_of
from ...runtime.files import free_bytes
from ..base import Logs, Loss, RunContext, WithoutRewardGradient
from ..shared import sampler_steps, training_guidance_scale
from .advantages import HISTORY, LEAST, Baseline, History, above_auxiliaries, equal, group_advantages, relative_distances
from .scoring import Scoring
from .selection import Round, Selection
from .store import File, Rollouts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyGradient(WithoutRewardGradient):
    """Rounds of rollouts. A subclass says which steps it trains, how it draws, and the losses of a part."""

    steps: int = sampler_steps(50)
    guidance_scale: float = training_guidance_scale(5.0, "official 5")
    group: int = field(default=8, metadata={"min": 1, "max": 1024, "help": "images of a prompt in a round, which are compared"})
    prompts_per_round: int = field(default=8, metadata={"min": 1, "max": 100000, "help": "prompts of a round of rollouts"})
    passes: int = field(default=1, metadata={"min": 1, "max": 100, "help": "times that a round is trained on (official 1)"})
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
    @abstractmethod
    def trained(self) -> int:
        """W, the trained steps of an image."""

    def check(self, context: RunContext) -> None:
        """Refuse micro-batches that do not divide a round, and a disk that a round does not fit on."""
        reward, sums = context.reward, isinstance(context.reward, SummedReward)
        if self.separate_rewards and not sums:
            raise ValueError('separate_rewards: give a sum of rewards, such as "hpsv2.1=1, pickscore=0.5"')
        if self.gate > 0 and not (isinstance(reward, SummedReward) and 0 in reward.weights and any(reward.weights)):
            raise ValueError('gate: give auxiliary rewards, which are those of weight 0 in a sum, such as "hpsv2.1=1, pickscore=0"')
        if self.diversity_weighted and context.features is None:
            raise ValueError(
                "diversity_weighted: give `features`, a two-tower reward in whose features images are compared (clip-l14, say)"
            )
        samples, count = self.images * self.trained, context.processes.count
        if context.batch_size and samples % context.batch_size:
            raise ValueError(
                f"batch_size = {context.batch_size}: a round has {self.images} images × {self.trained} trained steps = {samples} samples, "
                "give a divisor of that"
            )
        if context.processes.sharded and self.images % count:
            raise ValueError(f"group · prompts_per_round = {self.images}: with sharded weights (FSDP) give a multiple of {count} processes")
        needed, free = self.round_bytes(context.policy) / 1e9, free_bytes(context.folder) / 1e9
        if 2 * needed > free:  # beside the round of the last checkpoint
            raise ValueError(
                f"a round takes {needed:.3g} GB twice, but {context.folder} lies on a disk with {free:.3g} GB free: lower group, "
                "prompts_per_round or the trained steps"
            )

    def round_bytes(self, policy: Policy) -> int:
        """Size of a round's states on disk."""
        channels, height, width = policy.latent_shape
        return 4 * self.images * self.kept * channels * height * width

    @property
    @abstractmethod
    def kept(self) -> int:
        """K, the states that are kept of an image."""

    @abstractmethod
    def trained_steps(self, seed: int, number: int) -> Tensor:
        """The indices (N,W) of the sampler steps that round `number` trains."""

    @abstractmethod
    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rollouts of B prompts with trained steps index (B,W): states (B,K,C,h,w), ends (E·B,C,h,w), log-probabilities (B,W).

        first: the least index of the round's trained steps, at which a stretch of states begins. E: ends of one rollout, usually 1, which
        come one after another: B first ones, B second ones. A rollout's advantage is the sum of its ends'.
        """

    @abstractmethod
    def needed(self, step: int) -> range:
        """Which of the K states the step needs that is `step` steps after the first."""

    @abstractmethod
    def losses(self, run: RunContext, part: Selection) -> tuple[Tensor, Logs]:
        """Losses (B,) and logs of (B,) of a micro-batch."""

    def prompts_of(self, prompts: Sequence[str], seed: int, number: int) -> list[str]:
        """The prompts (N,) of round `number`, each `group` times: all of a run's prompts in a random order, again and again."""
        chosen: list[str] = []
        for place in range(number * self.prompts_per_round, (number + 1) * self.prompts_per_round):
            order = torch.randperm(len(prompts), generator=generator(seed, "prompts", place // len(prompts)))
            chosen += [prompts[int(order[place % len(prompts)])]] * self.group
        return chosen

    def begin(self, context: RunContext) -> Loss:
        """A run's loss, which owns the present round."""
        return Rounds(self, context)


class Rounds(Loss):
    """The rounds of one run."""

    def __init__(self, objective: PolicyGradient, run: RunContext) -> None:
        self.objective, self.run = objective, run
        self.store = Rollouts(run.folder / "rollouts", deletes=run.processes.main)
        self.history = History()
        self.round: Round | None = None
        self._draws: tuple[int, tuple[list[str], Tensor]] | None = None
        self._over = False  # whether the next optimizer step begins another round

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        o, rng = self.objective, batch.rng
        samples = o.images * o.trained
        number = rng.indices[0] // (o.passes * samples)
        self._over = self.run.step_samples > 0 and (rng.step + 1) * self.run.step_samples % (o.passes * samples) == 0
        if self.round is None or self.round.number != number:
            self.round = self._collect(rng, number, len(batch.prompts))
        order = torch.randperm(samples, generator=generator(rng.seed, "order", rng.indices[0] // samples))  # another one in each pass
        rows = order[torch.tensor(rng.indices) % samples]
        image, turn = rows // o.trained, rows % o.trained
        losses, logs = o.losses(self.run, self._part(rng, self.round, image, turn))
        size = self.round.advantages.abs()
        idle = size.reshape(-1, o.group).amax(1) == 0
        shown = {"reward": self.round.scores[image], "advantage size": size[image], "no advantage": idle[image // o.group].float()}
        return losses.mean(), {**logs, **shown}

    @property
    def scoring(self) -> Scoring:
        """What images are asked for."""
        return Scoring(self.run, self.objective.separate_rewards or self.objective.gate > 0, self.objective.diversity_weighted)

    def _part(self, rng: Rng, present: Round, image: Tensor, turn: Tensor) -> Selection:
        """The samples of images and turns (B,)."""
        o = self.objective
        prompts, index = self._chosen(rng.seed, present.number)
        steps = index[image, turn]
        needed = [o.needed(step) for step in (steps - index.min()).tolist()]
        states = [torch.stack([self.store.read(i, k) for k in some]) for i, some in zip(image.tolist(), needed, strict=True)]
        return Selection(
            tuple(prompts[i] for i in image.tolist()),
            rng,
            torch.stack(states).to(self.run.policy.device),
            steps,
            present.advantages[image],
            None if rng.step == present.step else present.log_probs[image, turn],
            present.held[image].float(),
        )

    def _chosen(self, seed: int, number: int) -> tuple[list[str], Tensor]:
        """The prompts (N,) of a round and the indices (N,W) of its trained steps."""
        if self._draws is None or self._draws[0] != number:
            self._draws = number, (self.objective.prompts_of(self.run.prompts, seed, number), self.objective.trained_steps(seed, number))
        return self._draws[1]

    @torch.no_grad()
    def _collect(self, rng: Rng, number: int, chunk: int) -> Round:
        """Draw and score the images of a round, `chunk` at a time; processes share them, and each compares all."""
        o, run, exchange = self.objective, self.run, self.run.processes.exchange
        if self.round is None:
            self.store.saved()  # deletes the files of an earlier run in this folder
            exchange(None)  # before any process adds its own
        prompts, index = self._chosen(rng.seed, number)
        share, made = run.processes.share(o.images), list[tuple[File, Tensor, Tensor, Tensor]]()
        for first in range(share.start, share.stop, chunk):
            rows = range(first, min(first + chunk, share.stop))
            part, seeds = prompts[rows.start : rows.stop], Rng(seed_of(rng.seed, "round"), number, tuple(rows))
            states, ends, log_probs = o.draw(run, part, seeds, index[rows.start : rows.stop], int(index.min()))
            scored = [self.scoring(run.policy.decode(some), part) for some in ends.split(len(part))]
            terms, features = torch.stack([terms for terms, _ in scored], 1), scored[0][1]
            made.append((self.store.write(number, first, states), log_probs.cpu(), terms.float().cpu(), features.float().cpu()))
        files, *columns = zip(*(one for some in exchange(made) for one in some))
        self.store.replace(files)
        log_probs, terms, features = map(torch.cat, columns)
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

    def state(self) -> dict[str, Any]:
        """The round, its list of files and the scores of earlier ones."""
        if self.round is None:
            return {}
        files = [] if self._over else [list(file) for file in self.store.files]
        return {"round": vars(self.round), "files": files, "history": self.history.scores}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        if state:
            self.round, self.history.scores = Round(**state["round"]), dict(state["history"])
            self.store.restore(state["files"])
            self._over = not state["files"]

    def saved(self) -> None:
        """Delete the files of rounds that no checkpoint needs, all of them where the round is over."""
        if self._over:
            self.store.replace(())
        self.store.saved()
