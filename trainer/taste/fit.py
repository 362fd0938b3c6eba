"""From comparisons to a head, its report, and its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageSource, load_bytes
from ..rewards.taste import TasteFile
from ..rewards.two_tower import TwoTower
from ..runtime.progress import progress_bar
from .agreement import Curve, Share, agreement, correct, held_out_logits, learning_curve, resampled
from .comparisons import Comparison, Gathered, Image, once
from .consistency import Consistency, consistency
from .folds import Folds, folds
from .head import Design, Features, best_precision
from .prototypes import Mixture, fit_mixture


@dataclass(frozen=True)
class Rated:
    """The features of every image under every prompt it was judged under, and where each comparison finds its two."""

    features: Features
    better: Tensor
    worse: Tensor

    def design(self, comparisons: Sequence[Comparison]) -> Design:
        """As a regression."""
        ties, weights = torch.tensor([one.tie for one in comparisons]), torch.tensor([one.weight for one in comparisons])
        return Design.of(self.features, self.better, self.worse, ties, weights)


@torch.no_grad()
def image_features(tower: TwoTower, images: Sequence[ImageSource]) -> Tensor:
    """(N,D) float64 on the CPU; each image is read in its own size, as `score` reads it."""
    found: list[Tensor] = []
    for image in progress_bar(images, "images of a taste"):
        pixels = load_bytes(image)[None].to(tower.home).float() / 255
        found.append(tower.image_features(pixels)[0].double().cpu())
    return torch.stack(found)


@torch.no_grad()
def rated(tower: TwoTower, comparisons: Sequence[Comparison]) -> Rated:
    """Each image is encoded once, whatever its prompts."""
    images: dict[str, Image] = {}
    rows: dict[tuple[str, str], int] = {}
    for one in comparisons:
        for image in (one.better, one.worse):
            images.setdefault(image.sha256, image)
            rows.setdefault((image.sha256, one.prompt), len(rows))
    place = {sha256: i for i, sha256 in enumerate(images)}
    seen = image_features(tower, [image.path for image in images.values()])[[place[sha256] for sha256, _ in rows]]
    features = under_prompts(tower, seen, [prompt for _, prompt in rows])
    at = [[rows[image.sha256, one.prompt] for one in comparisons for image in (getattr(one, side),)] for side in ("better", "worse")]
    return Rated(features, torch.tensor(at[0]), torch.tensor(at[1]))


@torch.no_grad()
def under_prompts(tower: TwoTower, seen: Tensor, prompts: Sequence[str]) -> Features:
    """Image features (N,D) and a prompt each -> features."""
    texts = tower.text_features(prompts).double().cpu()
    return Features(seen, texts, tower.scale * (seen * texts).sum(1))


@dataclass(frozen=True)
class Report:
    """What is known of a fitted taste."""

    tower: str
    choices: int
    people: list[str]
    prompts: int
    level: str
    groups: int
    precision: float
    agreement: Share | None
    baseline: Share
    gain: Share | None
    curve: Curve | None
    consistency: Consistency
    mixture: Mixture | None
    notes: list[str]

    @property
    def warnings(self) -> list[str]:
        """One line each; the first ones say whether to train on it at all."""
        found: list[str] = []
        if self.agreement is None:
            found.append("agreement cannot be measured: the choices are all about the same few images; judge further images")
        elif self.agreement.low <= 0.5:
            found.append(f"too weak to train on: it predicts {self.agreement} of the choices, which may be chance; make more choices")
        if self.gain is not None and self.gain.low <= 0:
            found.append(f"not shown to be better than {self.tower} alone, to which it adds {self.gain.value:+.2f} "
                         f"[{self.gain.low:+.2f}, {self.gain.high:+.2f}]")  # fmt: skip
        if self.level != "prompt and image":
            found.append("measured on prompts that it knows: too few prompts to hold some out; how it does on others is not known")
        return found + self.consistency.warnings

    def lines(self) -> list[str]:
        """The report in sentences."""
        who = f" of {len(self.people)} people" if len(self.people) > 1 else ""
        prior = "no head, the tower alone" if math.isinf(self.precision) else f"λ {self.precision:g}"
        said = [f"{self.choices} choices{who} under {self.prompts} prompts; prior chosen by cross-validation: {prior}"]
        unit = {"prompt and image": "no prompt and no image", "image": "no image", "pair": "no image, each pair alone"}[self.level]
        if self.agreement is not None:
            said.append(f"predicts {self.agreement} of held-out choices; {self.tower} alone {self.baseline} (95 %, Wilson at the effective "
                        f"number of choices, {self.groups} groups; both sides of a fold share {unit})")  # fmt: skip
        if self.curve is not None:
            points = ", ".join(f"{value:.2f} from {number:.0f}" for number, value in self.curve.points)
            said += [f"agreement by the number of choices learnt from: {points}", self.curve.sentence]
        if self.mixture is not None:
            said.append(self.mixture.sentence)
        return [*self.notes, *said, *(f"warning: {line}" for line in self.warnings)]

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        described = asdict(self)
        described["precision"] = "inf" if math.isinf(self.precision) else self.precision
        described["how much more would help"] = self.curve.sentence if self.curve else None
        return {**described, "warnings": self.warnings}


def fit_taste(found: Gathered, tower: TwoTower, name: str, sha256: str, person: str = "") -> tuple[TasteFile, Report]:
    """The head of `person`, or of all people together, and what is known of it.

    name, sha256: of the tower. Deterministic.
    """
    comparisons = once(found.comparisons)
    if person and person not in found.people:
        raise ValueError(f"nobody named {person!r} made a choice: {', '.join(found.people)}")
    known = rated(tower, comparisons)
    design = known.design(comparisons)
    keys = [one.keys for one in comparisons]
    of = folds(keys)
    precision = best_precision(design, of.parts)
    mixture = fit_mixture(design, [one.person for one in comparisons], of, precision) if len(found.people) > 1 else None
    of_person = torch.tensor([person in ("", one.person) for one in comparisons])
    if not bool((of_person & (design.outcome != 0.5)).any()):
        raise ValueError(f"{person!r} only tied: an agreement needs choices between two images")
    if mixture is not None and mixture.summary.prototypes > 1:
        held = mixture.held_out if person else mixture.held_out_mean  # of the head that is written
    else:
        held = held_out_logits(design, keys, of, precision)
    report = measured(found, design, of, precision, name, held, of_person)
    if mixture is None:
        return _file(known, design, design.fitted(precision), report, sha256, person), report
    report = replace(report, mixture=mixture.summary)
    return _file(known, design, mixture.of(person) if person else mixture.mean, report, sha256, person), report


def measured(found: Gathered, design: Design, of: Folds, precision: float, tower: str, held: Tensor, counted: Tensor) -> Report:
    """The report without the mixture. held: logits (n,) of each pair without its fold; counted (n,) bool: whose agreement is meant."""
    comparisons = found.comparisons
    judged = (design.outcome != 0.5) & counted
    tested = judged & held.isfinite()
    rows = lambda mask: [g for g, k in zip(of.groups, mask.tolist()) if k]  # noqa: E731
    enough = int(tested.sum()) >= 8
    ours, alone = correct(held), correct(design.offset)
    shown = tested if enough else judged
    gain = None
    if enough:
        difference, weight = (ours - alone)[tested], design.weight[tested]
        low, high = resampled(difference[:, None], weight, rows(tested))
        gain = Share(float((weight * difference).sum() / weight.sum()), float(low), float(high))
    return Report(
        tower=tower,
        choices=sum(not one.tie for one in comparisons),
        people=found.people,
        prompts=len({one.keys.all[0] for one in comparisons}),
        level=of.level,
        groups=len(set(of.groups)),
        precision=precision,
        agreement=agreement(ours[tested], design.weight[tested], rows(tested)) if enough else None,
        baseline=agreement(alone[shown], design.weight[shown], rows(shown)),
        gain=gain,
        curve=learning_curve(design, of, precision) if not math.isinf(precision) else None,
        consistency=consistency(found),
        mixture=None,
        notes=found.notes,
    )


def _file(known: Rated, design: Design, beta: Tensor, report: Report, sha256: str, person: str) -> TasteFile:
    theta, (unit, image, met) = design.basis @ beta, design.scales
    width = known.features.image.shape[1]
    columns, offset = design.columns(known.features)
    scores = offset + columns @ theta
    share = report.agreement
    return TasteFile(
        baseline=(1 + float(theta[0])) / unit,
        image=theta[1 : 1 + width] / image,
        product=theta[1 + width :] / met,
        tower=report.tower,
        tower_sha256=sha256,
        mean=float(scores.mean()),
        std=float(scores.std()),
        choices=report.choices,
        agreement=(share.value, share.low, share.high) if share else None,
        precision=report.precision,
        person=person,
        facts={"baseline agreement": report.baseline.value, "people": report.people, "prompts": report.prompts},
    )
