"""SQDF against an oracle that has no gradient and a budget of queries: label own samples, fit a surrogate, train on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batches import Batch
from ...rng import Rng, generator, seed_of
from ..base import ImageFeatures, Logs, Loss, RunContext
from .sqdf import SQDF, SoftQ, rollouts

Optimism = Literal["bootstrap", "ucb"]
Covariance = Literal["mean", "sum"]
"""Of the surrogate's inner features: their sample covariance, or 0.1.0's sum of outer products, √N times too large in the bonus."""
_RIDGE = 1e-3  # official: λ added to the covariance Σ
_BONUS_LIMIT = 10.0  # official: clip of that root


@dataclass(frozen=True)
class BlackBoxSQDF(SQDF):
    """SQDF online with a black-box reward (Kang et al. 2025, arXiv:2512.04559, section 5.3): outer loops of queries.

    Each loop labels `queries` samples of the current model, fits an ensemble on frozen image and text features to all
    labels so far, and trains on its optimistic prediction. The replay buffer starts anew with each loop.
    """

    title: ClassVar[str] = "SQDF (black box)"
    queries: tuple[int, ...] = field(
        default=(1024, 2048, 4096, 8192), metadata={"help": "oracle calls of each outer loop (official: 15360 in four)"}
    )
    updates_per_loop: int = field(default=40, metadata={"min": 1, "max": 100000, "help": "micro-batches between queries (official 40)"})
    heads: int = field(
        default=4, metadata={"min": 1, "max": 64, "help": "surrogates, each fitted to its own bootstrap sample (official 4)"}
    )
    optimism: Optimism = field(
        default="bootstrap",
        metadata={"help": "bootstrap: the highest head; ucb: their mean plus a bonus far from the labelled images"},
    )
    ucb_weight: float = field(default=0.01, metadata={"min": 0.0, "help": "weight of that bonus (official 0.01)"})
    epochs: int = field(default=100, metadata={"min": 1, "max": 10000, "help": "passes over the labels when fitting (official 300)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.queries or min(self.queries) < 2:
            raise ValueError("queries: give at least one loop of at least 2 oracle calls")

    @property
    def needs_gradient(self) -> bool:
        """The oracle is never differentiated."""
        return False

    def check(self, context: RunContext) -> None:
        """As SQDF; and refuse a run without features for the surrogate."""
        super().check(context)
        if context.features is None:
            raise ValueError("a black-box reward needs `features`: a two-tower reward whose features a surrogate reads (clip-l14, say)")
        if context.processes.sharded and any(total % context.processes.count for total in self.queries):
            raise ValueError(f"queries = {self.queries}: with sharded weights (FSDP) give multiples of {context.processes.count} processes")

    def begin(self, context: RunContext) -> Loss:
        """A run's loss, which owns buffer, labels and surrogate."""
        return BlackBox(self, context)


class Surrogate(nn.Module):
    """An ensemble of small networks on frozen features, as a differentiable reward in standard deviations of the first labels."""

    differentiable = True

    def __init__(self, features: ImageFeatures, objective: BlackBoxSQDF, width: int, covariance: Covariance = "mean") -> None:
        super().__init__()
        self.objective = objective
        self.covariance: Covariance = covariance
        self.image_features, self.text_features = features.image_features, features.text_features  # no submodule: `to` leaves it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every loop begins with the same networks; their data tell them apart
            self.heads = nn.ModuleList([_head(width) for _ in range(objective.heads)])
        self.register_buffer("covariances", torch.zeros(objective.heads, 16, 16), persistent=False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        x = joined(self.image_features(images), self.text_features(prompts))
        inner = [_inner(head, x) for head in self.heads]
        outputs = torch.stack([_outer(head, h) for head, h in zip(self.heads, inner)])
        if self.objective.optimism == "bootstrap":
            return outputs.amax(0)
        bonuses = [bonus(h, covariance) for h, covariance in zip(inner, self.covariances)]
        return outputs.mean(0) + self.objective.ucb_weight * torch.stack(bonuses).mean(0)

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> None:
        """Fit each head to a bootstrap sample of (N,3D) inputs and (N,) standardised labels."""
        with torch.enable_grad():
            for number, head in enumerate(self.heads):
                rng = generator(seed, "surrogate", number)
                rows = torch.randint(len(x), (len(x),), generator=rng)
                optimizer = torch.optim.Adam(head.requires_grad_(True).parameters(), lr=1e-3, weight_decay=1e-4)
                for _ in range(self.objective.epochs):
                    for part in rows[torch.randperm(len(rows), generator=rng)].split(512):
                        optimizer.zero_grad(set_to_none=True)
                        F.mse_loss(_outer(head, _inner(head, x[part])), labels[part]).backward()
                        optimizer.step()
        self.measure(x)

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Freeze the heads and compute the covariances Σ + λ of their inner features over all labelled images, for the bonus."""
        self.heads.requires_grad_(False)
        self.covariances = torch.stack([regularised_covariance(_inner(head, x), self.covariance) for head in self.heads])


def regularised_covariance(inner: Tensor, kind: Covariance) -> Tensor:
    """Σ + λ of features (N,16)."""
    return (torch.cov(inner.T) if kind == "mean" else inner.T @ inner) + _RIDGE * torch.eye(16)


def bonus(inner: Tensor, covariance: Tensor) -> Tensor:
    """√(hᵀΣ⁻¹h) of features (B,16), at most 10: (B,)."""
    return (inner * torch.linalg.solve(covariance, inner.T).T).sum(1).clamp(min=0).sqrt().clamp(max=_BONUS_LIMIT)


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))


def _inner(head: Any, x: Tensor) -> Tensor:
    """The 16 inner features (B,16)."""
    return head[:4](x)


def _outer(head: Any, inner: Tensor) -> Tensor:
    return head[4](inner)[:, 0]


def joined(images: Tensor, texts: Tensor) -> Tensor:
    """A surrogate's inputs (B,3D): image, text, and their product, whose sum is the two towers' own score."""
    return torch.cat([images, texts, images * texts * images.shape[1] ** 0.5], 1)


class BlackBox(Loss):
    """The outer loops: labels and surrogate beside SQDF's buffer."""

    def __init__(self, objective: BlackBoxSQDF, context: RunContext) -> None:
        assert context.features is not None, "check() comes first"
        self.objective, self.run, self.features = objective, context, context.features
        self.inner = SoftQ(objective, context)
        self.loop = -1
        self.images = torch.empty(0)  # (N,D) features of all labelled images
        self.prompts: list[str] = []
        self.labels = torch.empty(0)
        self.surrogate: Surrogate | None = None
        self.covariance: Covariance = "mean"

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,); `reward` is the surrogate's, `oracle` the last loop's mean label."""
        loop = min(batch.number // self.objective.updates_per_loop, len(self.objective.queries) - 1)
        if loop != self.loop:
            self._query(batch.rng.seed, loop, len(batch.prompts))
        self.inner.run = replace(self.run, reward=self.surrogate)
        loss, logs = self.inner(batch)
        oracle, queries = self.labels[-self.objective.queries[self.loop] :].mean(), torch.tensor(float(len(self.labels)))
        return loss, {**logs, "oracle": oracle.expand(len(batch.prompts)), "queries": queries.expand(len(batch.prompts))}

    @torch.no_grad()
    def _query(self, seed: int, loop: int, chunk: int) -> None:
        """Label samples of the present model, `chunk` at a time, and fit a new surrogate to all labels."""
        run, o, total = self.run, self.objective, self.objective.queries[loop]
        order = torch.randperm(max(total, len(run.prompts)), generator=generator(seed, "queries", loop))[:total]
        prompts = [run.prompts[int(i) % len(run.prompts)] for i in order]
        images, labels = list[Tensor](), list[Tensor]()
        share = run.processes.share(total)  # all processes together make as many oracle calls as one would
        for first in range(share.start, share.stop, chunk):
            part = prompts[first : min(first + chunk, share.stop)]
            rng = Rng(seed_of(seed, "query"), loop, tuple(range(first, first + len(part))))
            drawn = run.policy.decode(rollouts(o, run.policy, part, rng)[1])
            labels.append(run.required_reward(drawn, part).float().cpu())
            images.append(self.features.image_features(drawn).float().cpu())
        gathered = [pair for pairs in run.processes.exchange(list(zip(images, labels))) for pair in pairs]
        self.images = torch.cat([self.images.reshape(-1, gathered[0][0].shape[1]), *(features for features, _ in gathered)])
        self.labels, self.prompts = torch.cat([self.labels, *(scores for _, scores in gathered)]), [*self.prompts, *prompts]
        self.loop = loop
        first_labels = self.labels[: o.queries[0]]
        standardised = (self.labels - first_labels.mean()) / first_labels.std().clamp(min=1e-6)
        with torch.inference_mode(False):
            self._renew(lambda surrogate, x: surrogate.fit(x, standardised, seed_of(seed, "fit", loop)))
        if self.inner.replay:
            self.inner.replay.clear()

    def _renew(self, prepare: Callable[[Surrogate, Tensor], None]) -> None:
        """A new surrogate, prepared on the inputs (N,3D) of all labelled images, on the device of the features."""
        surrogate = Surrogate(self.features, self.objective, 3 * self.images.shape[1], self.covariance)
        texts = self.features.text_features(self.prompts)
        prepare(surrogate, joined(self.images, texts.float().cpu()))
        self.surrogate = surrogate.to(texts.device)

    def state(self) -> dict[str, Any]:
        """Labels, the surrogate's weights, and the buffer's list."""
        heads = {k: v.cpu() for k, v in self.surrogate.heads.state_dict().items()} if self.surrogate else {}
        kept = {"loop": self.loop, "images": self.images, "prompts": self.prompts, "labels": self.labels, "covariance": self.covariance}
        return {**kept, "heads": heads, "inner": self.inner.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`, without oracle calls."""
        self.loop, self.images, self.prompts, self.labels = state["loop"], state["images"], state["prompts"], state["labels"]
        self.covariance = state.get("covariance", "sum")  # a run that 0.1.0 started keeps its bonus
        self.inner.restore(state["inner"])

        def load(surrogate: Surrogate, x: Tensor) -> None:
            surrogate.heads.load_state_dict(state["heads"])
            surrogate.measure(x)

        if state["heads"]:
            self._renew(load)

    def saved(self) -> None:
        """As the buffer."""
        self.inner.saved()
