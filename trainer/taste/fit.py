"""From comparisons to a head, its report, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageSource, load_bytes
from ..rewards.taste import TasteFile
from ..rewards.two_tower import TwoTower
from ..runtime.progress import progress_bar
from .agreement import Agreement, by_chance, held_out_logits, measure
from .comparisons import Comparison, Gathered, Image, once
from .consistency import Consistency, consistency
from .curve import Curve, learning_curve
from .estimate import Estimate, Units
from .folds import folds
from .head import Design, Features, best_precision
from .prototypes import Fitted, Mixture, fit_mixture, solve


@dataclass(frozen=True)
class Rated:
    """The features of every image under every prompt it was judged under, and where each comparison finds its two."""

    features: Features
    better: Tensor
    worse: Tensor
    rows: list[tuple[str, str]]
    """Image and prompt of each row of the features."""

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
    return Rated(features, torch.tensor(at[0]), torch.tensor(at[1]), list(rows))


@torch.no_grad()
def under_prompts(tower: TwoTower, seen: Tensor, prompts: Sequence[str]) -> Features:
    """Image features (N,D) and a prompt each -> features."""
    texts = tower.text_features(prompts).double().cpu()
    return Features(seen, texts, tower.scale * (seen * texts).sum(1))


@dataclass(frozen=True)
class Report:
    """What is known of a fitted taste. With a person, of that person's choices."""

    tower: str
    person: str
    choices: int
    asked: int
    """How many of them are of pairs that were asked next."""
    people: list[str]
    prompts: int
    level: str
    units: int
    """Groups of choices that share nothing, or images where they connect all choices: what the intervals count."""
    precision: float
    agreement: Estimate | None
    baseline: Estimate
    gain: Estimate | None
    chance: float | None
    """How often permuted features do as well (`agreement.measure`)."""
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
            found.append(f"not shown to be better than {self.tower} alone, to which it adds {self.gain.signed}")
        if self.level != "prompt and image":
            found.append("measured on prompts that it knows: too few prompts to hold some out; how it does on others is not known")
        return found + self.consistency.warnings

    def lines(self) -> list[str]:
        """The report in sentences."""
        who = f" of {self.person}" if self.person else f" of {len(self.people)} people" if len(self.people) > 1 else ""
        prior = "no head, the tower alone" if math.isinf(self.precision) else f"λ {self.precision:g}"
        asked = f", {self.asked} of them asked next and not counted below" if self.asked else ""
        said = [f"{self.choices} choices{who} under {self.prompts} prompts{asked}; prior chosen by cross-validation: {prior}"]
        unit = {"prompt and image": "no prompt and no image", "image": "no image", "pair": "no image, each pair alone"}[self.level]
        if self.agreement is not None:
            lucky = "" if self.chance is None else f", as permuted images do in {self.chance:.1%} of the cases"
            units = f"{self.units} images" if self.level == "pair" else f"{self.units} groups of choices"
            said.append(
                f"predicts {self.agreement} of held-out choices{lucky}; {self.tower} alone {self.baseline} "
                f"(95 % by {units}; both sides of a fold share {unit})"
            )
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
    if person and person not in found.people:
        raise ValueError(f"nobody named {person!r} made a choice: {', '.join(found.people)}")
    known = rated(tower, found.comparisons)
    beta, report = fitted(found, known, name, person)
    return _file(known, known.design(once(found.comparisons)), beta, report, sha256), report


def fitted(found: Gathered, known: Rated, tower: str, person: str = "") -> tuple[Tensor, Report]:
    """The head β (r,) of `person`, or of all people together, in the basis of the choices' design, and its report."""
    comparisons = once(found.comparisons)
    design, keys = known.design(comparisons), [one.keys for one in comparisons]
    of, people = folds(keys), [one.person for one in comparisons]
    counted = torch.tensor([person in ("", one.person) and not one.asked for one in comparisons])
    if not bool((counted & (design.outcome != 0.5)).any()):
        raise ValueError(f"{person or 'these choices'}: all ties, or of pairs that were asked next: agreement is measured on other choices")
    mixture = fit_mixture(design, people, of) if len(found.people) > 1 else None
    if mixture is not None and mixture.summary.prototypes > 1:
        precision, held = mixture.precision, mixture.held_out if person else mixture.held_out_mean  # of the head that is written
        head = _of_several(design, mixture, people, person)
    else:
        precision = best_precision(design, of.parts)
        held, head = held_out_logits(design, keys, of, precision), lambda rows: design.fitted(precision, rows)
    units, (images, prompts) = Units.of(of, keys), zip(*known.rows)
    null = by_chance(known.features, known.better, known.worse, images, prompts, design, of, counted)
    curve = learning_curve(design, of, units, counted, head) if not math.isinf(precision) else None
    seen = found.of(person) if person else found
    report = _report(seen, measure(held, design, units, counted, null), tower, person, of.level, len(units.where(counted)), precision)
    return head(torch.arange(len(design))), replace(report, curve=curve, mixture=mixture.summary if mixture else None)


def _of_several(design: Design, mixture: Fitted, people: Sequence[str], person: str) -> Callable[[Tensor], Tensor]:
    """Rows of choices -> the head (r,) of the mixture that is written: the person's, or the mean."""
    who = torch.tensor([mixture.people.index(one) for one in people])

    def head(rows: Tensor) -> Tensor:
        prototypes, weights = solve(design, who, len(mixture.people), rows, mixture.precision, mixture.summary.prototypes)
        return (weights[mixture.people.index(person)] if person else weights.mean(0)) @ prototypes

    return head


def _report(found: Gathered, seen: Agreement, tower: str, person: str, level: str, units: int, precision: float) -> Report:
    """Without curve and mixture."""
    return Report(
        tower=tower,
        person=person,
        choices=found.choices,
        asked=replace(found, comparisons=[one for one in found.comparisons if one.asked]).choices,
        people=found.people,
        prompts=len({one.keys.all[0] for one in found.comparisons}),
        level=level,
        units=units,
        precision=precision,
        agreement=seen.head,
        baseline=seen.tower,
        gain=seen.gain,
        chance=seen.chance,
        curve=None,
        consistency=consistency(found),
        mixture=None,
        notes=found.notes,
    )


def _file(known: Rated, design: Design, beta: Tensor, report: Report, sha256: str) -> TasteFile:
    theta, (unit, image, met) = design.basis @ beta, design.scales
    width = known.features.image.shape[1]
    columns, offset = design.columns(known.features)
    scores = offset + columns @ theta
    plain = lambda one: (one.value, one.low, one.high) if one else None  # noqa: E731
    return TasteFile(
        baseline=(1 + float(theta[0])) / unit,
        image=theta[1 : 1 + width] / image,
        product=theta[1 + width :] / met,
        tower=report.tower,
        tower_sha256=sha256,
        mean=float(scores.mean()),
        std=float(scores.std()),
        choices=report.choices,
        agreement=plain(report.agreement),
        precision=report.precision,
        person=report.person,
        facts={
            "baseline agreement": report.baseline.value,
            "gain over the tower": plain(report.gain),
            "by chance": report.chance,
            "measured on other": report.level,
            "people": report.people,
            "prompts": report.prompts,
        },
    )
