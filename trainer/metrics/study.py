"""Compare models with their base in chunks of prompts, and resume after a stop.

Images are scored as they are generated and are not stored; scores and features are, on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import present_names
from ..reward import Reward
from ..runtime.files import check_weights, replacing, write_text
from .distances import Moments, frechet_distance
from .diversity import Diversity, pairwise_diversity, vendi_score
from .finite import check_finite
from .intervals import jackknife
from .streaming import FeatureStatistics, distances
from .summary import Features, Judged, frontier_area, intervals

Point = tuple[str, int]  # a model's name and its switch
BASE: Point = ("base", 0)
SETTINGS, INCEPTION = "settings.json", "fid_inception"
_CHUNK = re.compile(r"\d{6}\.(safetensors|partial|safetensors\.partial)|\.tmp\w{6}")  # the last is safetensors' own
JUDGE_BATCH = 64  # images per call of a reward or feature extractor


@dataclass(frozen=True)
class Judges:
    """Rewards and feature extractors by name, and LPIPS if its weights are present; metrics of the first extractor carry no prefix.

    match: images (N,3,H,W), N prompts -> (N,) of 0 and 1: whether an image shows what its prompt names. Only pairs of images that do
    add to the diversity under the first extractor, and the share that does is the figure `match`. inception: the network of the
    published FID, for the figure `fid_inception` alone.
    """

    rewards: Mapping[str, Reward]
    features: Mapping[str, Features]
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    device: str = "cpu"
    match: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    inception: Features | None = None

    @property
    def extractors(self) -> dict[str, Features]:
        """All feature extractors by the name under which their features are stored; that of FID is not among the names of rewards."""
        return {**self.features, **({INCEPTION: self.inception} if self.inception is not None else {})}

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Images (N,3,H,W) with all images of each prompt -> scores (N,), features (N,D) and LPIPS diversity (P,) by name."""
        found: dict[str, list[Tensor]] = {}
        for first in range(0, len(images), JUDGE_BATCH):
            part = images[first : first + JUDGE_BATCH].to(self.device)
            for name, reward in self.rewards.items():
                scores = reward(part, prompts[first : first + JUDGE_BATCH]).float()
                bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
                if bad:
                    raise ValueError(f"{name} gave {float(scores[bad[0]])} to an image of {prompts[first + bad[0]]!r}: use another reward")
                found.setdefault(f"reward {name}", []).append(scores)
            for name, features in self.extractors.items():
                found.setdefault(f"features {name}", []).append(features(part).float())
            if self.match is not None:
                found.setdefault("match", []).append(self.match(part, prompts[first : first + JUDGE_BATCH]).float())
        joined = {name: torch.cat(values).cpu().contiguous() for name, values in found.items()}
        if self.lpips is not None:
            by_prompt = pairwise_diversity(self.lpips, images.to(self.device), prompts)
            joined["lpips"] = torch.stack(list(by_prompt.values())).float().cpu()
        return joined


@dataclass(frozen=True)
class PromptChunk:
    """Some prompts with all their images: the chunk's number, the number of its first image, and each image's prompt."""

    number: int
    first: int
    prompts: Sequence[str]


class Study:
    """The chunks of one comparison in a folder, `000000.safetensors` onwards, beside `settings.json`, which identifies the comparison.

    settings: what identifies it beside points, prompts and judges; `weights` in it are SHA-256 by name.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], points: Sequence[Point], judges: Judges, settings: Mapping[str, Any]) -> None:
        counts: dict[str, int] = {}
        for prompt in prompts:
            counts[prompt] = counts.get(prompt, 0) + 1
        lone = next((p for p, n in counts.items() if n < 2), None)
        if lone is not None:
            raise ValueError(f"prompt {lone!r} has 1 image: diversity needs at least two")
        self.folder, self.counts, self.points, self.judges = folder, counts, [BASE, *points], judges
        kinds = [*judges.rewards, *judges.extractors, *(["lpips"] if judges.lpips else []), *(["match"] if judges.match else [])]
        self.settings = json.loads(json.dumps({**settings, "judges": kinds, "points": self.points, "prompts": counts}))

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder or, with `resume`, check that it belongs to this study."""
        path = self.folder / SETTINGS
        if not path.is_file() or (overwrite and not resume):
            self.clear()  # without settings chunks are the rest of a folder that was being deleted
        if path.is_file():
            if not resume:
                raise ValueError(
                    f"{self.folder} holds an interrupted evaluation: add --resume to continue it, or --overwrite to start again"
                )
            try:
                earlier: dict[str, Any] = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: add --overwrite to start again") from error
            earlier["settings"] = present_names(earlier.get("settings", {}))
            remedy = "add --overwrite to start again; the earlier reward stays loadable by its folder or file: --reward PATH"
            check_weights(self.folder, earlier.get("weights"), self.settings.get("weights", {}), remedy)
            other = next((key for key, value in self.settings.items() if key != "weights" and earlier.get(key) != value), None)
            if other is not None:
                raise ValueError(f"{self.folder} was started with different {other}: use the same, or add --overwrite to start again")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(self.settings) + "\n", path)

    def parts(self, size: int) -> Iterator[PromptChunk]:
        """The chunks that are not on the disk yet: whole prompts, with at least `size` images per chunk."""
        number = first = 0
        waiting: list[str] = []
        for i, (prompt, count) in enumerate(self.counts.items()):
            waiting += [prompt] * count
            if len(waiting) >= size or i == len(self.counts) - 1:
                if not self._path(number).is_file():
                    yield PromptChunk(number, first, waiting)
                number, first, waiting = number + 1, first + len(waiting), []

    def add(self, part: PromptChunk, images: Mapping[Point, Tensor]) -> None:
        """Score the images (N,3,H,W) of every point of one chunk, and write scores and features."""
        kept: dict[str, Tensor] = {}
        for i, point in enumerate(self.points):
            check_finite(images[point], part.prompts, f"{point[0]} from step {point[1]} drew values")
            for name, values in self.judges.judge(images[point], part.prompts).items():
                kept[f"{i} {name}"] = check_finite(values, part.prompts, f"{name} of {point[0]} from step {point[1]} gave values")
        path = self._path(part.number)
        try:
            with replacing(path) as partial:
                save_file(kept, partial, {"pixels": str(images[BASE].shape[-1])})
        except SafetensorError as error:  # of a full disk too
            raise OSError(f"cannot write {path}: {error}") from error

    @property
    def pixels(self) -> int:
        """Width in pixels of the images that were scored."""
        with safe_open(self._path(0), "pt") as file:
            return int(file.metadata()["pixels"])

    @property
    def widths(self) -> dict[str, int]:
        """Number of features of each extractor."""
        return {name: next(self._read(BASE, f"features {name}")).shape[1] for name in self.judges.extractors}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, point: Point, name: str) -> Iterator[Tensor]:
        """One kind of value of one point, chunk by chunk."""
        for path in sorted(path for path in self.folder.glob("*.safetensors") if _CHUNK.fullmatch(path.name)):
            with safe_open(path, "pt") as file:
                yield file.get_tensor(f"{self.points.index(point)} {name}")

    def _by_prompt(self, point: Point, name: str) -> Iterator[Tensor]:
        """The same, prompt by prompt."""
        counts = iter(self.counts.values())
        for values in self._read(point, name):
            while len(values):
                n = next(counts)
                yield values[:n]
                values = values[n:]

    def summarise(self, real: Mapping[str, Iterable[Tensor]] | None = None) -> dict[str, Any]:
        """All metrics of all points, frontiers, and 95 % intervals; `real` yields batches of features of real images by extractor.

        Metrics of the first extractor are `diversity`, `vendi`, `fid`, `kid`, `logcov`; another's carry the prefix `<name>_`.
        Without real images distances are to the base's images, and the base has none.
        """
        statistics: dict[str, FeatureStatistics] = {}
        if real is not None:
            for name in self.judges.features:
                statistics[name] = FeatureStatistics()
                for seen in real[name]:
                    statistics[name].update(seen, [0] * len(seen))
        base_statistics = {name: self._statistics(BASE, name) for name in self.judges.features}
        references = statistics if real is not None else base_statistics
        base_distances = _Distances(base_statistics, references, real is None)
        base_figures = base_distances.figures()
        base = self.judged(BASE)
        judged: dict[Point, Judged] = {BASE: base}
        own = base_figures if real is not None else {name: base_figures[name] for name in ("fid", "logcov")}  # 0 to itself; KID is not
        inception = self._inception(real)
        rows: dict[Point, dict[str, float]] = {BASE: {**base.means(), **own, **inception[BASE]}}
        differences: list[dict[str, Any]] = []
        absolute: list[dict[str, Any]] = [{"model": "base", **intervals(base), **({} if real is None else base_distances.intervals())}]
        for point in self.points[1:]:
            mine = {name: self._statistics(point, name) for name in self.judges.features}
            distance = _Distances(mine, references, real is None)
            figures = distance.figures()
            judged[point] = self.judged(point)
            rows[point] = {**judged[point].means(), **figures, **inception[point]}
            here = {"model": point[0], "k": point[1]}
            differences.append(
                {**here, **intervals(judged[point], base), **distance.intervals(base_distances if real is not None else None)}
            )
            absolute.append({**here, **intervals(judged[point]), **distance.intervals()})
        models = list(dict.fromkeys(model for model, _ in self.points[1:]))
        curves = {m: [judged[p] for p in self.points[1:] if p[0] == m] for m in models}
        return {
            "base": rows[BASE],
            "points": [{"model": m, "k": k, **rows[m, k]} for m, k in self.points[1:]],
            "frontier": {m: {r: frontier_area(curve, base, r) for r in self.judges.rewards} for m, curve in curves.items()},
            "ci": differences,
            "ci_absolute": absolute,
            "features": list(self.judges.features),
            "reference": "real images" if real is not None else "the base model's images",
        }

    def _inception(self, real: Mapping[str, Iterable[Tensor]] | None) -> dict[Point, dict[str, float]]:
        """The published FID of each point, without an interval: ten more roots of 2048 × 2048 matrices would take minutes a point."""
        if self.judges.inception is None:
            return {point: {} for point in self.points}
        reference = Moments.of(self._read(BASE, f"features {INCEPTION}") if real is None else real[INCEPTION])
        return {p: {INCEPTION: frechet_distance(Moments.of(self._read(p, f"features {INCEPTION}")), reference)} for p in self.points}

    def _statistics(self, point: Point, name: str) -> FeatureStatistics:
        statistics = FeatureStatistics()
        for number, rows in enumerate(self._by_prompt(point, f"features {name}")):
            statistics.update(rows, [number] * len(rows))
        return statistics

    def judged(self, point: Point) -> Judged:
        """The figures per prompt of one point."""
        rewards = {name: torch.stack([v.double().mean() for v in self._by_prompt(point, f"reward {name}")]) for name in self.judges.rewards}
        spread: dict[str, Tensor] = {}
        matches = list(self._by_prompt(point, "match")) if self.judges.match is not None else None
        if matches is not None:
            spread["match"] = torch.stack([values.double().mean() for values in matches])
        for i, name in enumerate(self.judges.features):
            diversity, vendi = Diversity(), list[float]()
            for number, rows in enumerate(self._by_prompt(point, f"features {name}")):
                diversity.update(rows, [number] * len(rows), matches[number] if matches is not None and i == 0 else None)
                vendi.append(vendi_score(rows))
            spread[self._named(name, "diversity")] = torch.stack(list(diversity.values().values()))
            spread[self._named(name, "vendi")] = torch.tensor(vendi, dtype=torch.float64)
        if self.judges.lpips is not None:
            spread["lpips_diversity"] = torch.cat(list(self._read(point, "lpips"))).double()
        return Judged(rewards, spread.pop("diversity"), spread)

    def _named(self, feature: str, figure: str) -> str:
        return figure if feature == next(iter(self.judges.features)) else f"{feature}_{figure}"

    def clear(self) -> None:
        """Delete the study's files, its settings last, and the folder where it holds no others."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _CHUNK.fullmatch(path.name):
                path.unlink()
        for path in (self.folder / f"{SETTINGS}.partial", self.folder / SETTINGS):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


@dataclass(frozen=True)
class _Distances:
    """Distances of one point under every feature extractor; `paired` if the reference has the same prompts."""

    mine: Mapping[str, FeatureStatistics]
    references: Mapping[str, FeatureStatistics]
    paired: bool

    def figures(self, block: int | None = None) -> dict[str, float]:
        found: dict[str, float] = {}
        for i, (name, statistics) in enumerate(self.mine.items()):
            values = distances(statistics, self.references[name], block, self.paired)
            found |= {metric if i == 0 else f"{name}_{metric}": value for metric, value in values.items()}
        return found

    def intervals(self, base: _Distances | None = None) -> dict[str, list[float]]:
        """Intervals of the distances or, given a base, of their differences to the base's."""

        def statistic(block: int | None) -> dict[str, float]:
            off = base.figures(block) if base is not None else {}
            return {name: value - off.get(name, 0.0) for name, value in self.figures(block).items()}

        return jackknife(statistic, next(iter(self.mine.values())).blocks)
