"""A comparison of models with their base, part by part: images are judged as they are drawn and never kept.

What is kept of an image are its scores and its features, on disk; a study that was stopped goes on at the next part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..reward import Reward
from .diversity import Diversity, pairwise_diversity, vendi_score
from .streaming import FeatureStatistics, distances, jackknife
from .summary import Features, Judged, frontier_area, intervals

Point = tuple[str, int]  # a model's name and its switch
BASE: Point = ("base", 0)
AT_ONCE = 64  # images that a judge sees together


@dataclass(frozen=True)
class Judges:
    """Rewards by name; feature extractors by name, the first being the one whose figures need no name; LPIPS where it is at hand."""

    rewards: Mapping[str, Reward]
    features: Mapping[str, Features]
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    device: str = "cpu"

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Images (N,3,H,W), those of a prompt all here, -> scores (N,), features (N,D), and LPIPS diversity (P,), by kind and name."""
        found: dict[str, list[Tensor]] = {}
        for first in range(0, len(images), AT_ONCE):
            part = images[first : first + AT_ONCE].to(self.device)
            for name, reward in self.rewards.items():
                found.setdefault(f"reward {name}", []).append(reward(part, prompts[first : first + AT_ONCE]).float())
            for name, features in self.features.items():
                found.setdefault(f"features {name}", []).append(features(part).float())
        joined = {name: torch.cat(values).cpu().contiguous() for name, values in found.items()}
        if self.lpips is not None:
            by_prompt = pairwise_diversity(self.lpips, images.to(self.device), prompts)
            joined["lpips"] = torch.stack(list(by_prompt.values())).float().cpu()
        return joined


@dataclass(frozen=True)
class Part:
    """Some prompts with all their images: the number of the first image, and the prompt of each."""

    number: int
    first: int
    prompts: Sequence[str]


class Study:
    """The parts of one comparison in a folder, `000000.safetensors` and on, beside `settings.json`, which says what is compared."""

    def __init__(self, folder: Path, prompts: Sequence[str], points: Sequence[Point], judges: Judges, settings: Mapping[str, Any]) -> None:
        counts: dict[str, int] = {}
        for prompt in prompts:
            counts[prompt] = counts.get(prompt, 0) + 1
        lone = next((p for p, n in counts.items() if n < 2), None)
        if lone is not None:
            raise ValueError(f"prompt {lone!r} has 1 image: diversity needs at least two")
        self.folder, self.counts, self.points, self.judges = folder, counts, [BASE, *points], judges
        kinds = [*judges.rewards, *judges.features, *(["lpips"] if judges.lpips else [])]
        self.settings = json.loads(json.dumps({**settings, "judges": kinds, "points": self.points, "prompts": counts}))

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready: a new one, or with `resume` the same study's."""
        path = self.folder / "settings.json"
        if self.folder.exists() and overwrite and not resume:
            shutil.rmtree(self.folder)
        if path.is_file():
            if not resume:
                raise ValueError(
                    f"{self.folder} is of an evaluation that was stopped: add --resume to go on, or --overwrite to start again"
                )
            earlier = json.loads(path.read_text("utf-8"))
            other = next((key for key, value in self.settings.items() if earlier.get(key) != value), None)
            if other is not None:
                raise ValueError(f"{self.folder} was begun with other {other}: ask for the same, or add --overwrite to start again")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.settings) + "\n", "utf-8")

    def parts(self, size: int) -> Iterator[Part]:
        """The parts that are still to be drawn: whole prompts, as many as have at least `size` images together."""
        number = first = 0
        waiting: list[str] = []
        for i, (prompt, count) in enumerate(self.counts.items()):
            waiting += [prompt] * count
            if len(waiting) >= size or i == len(self.counts) - 1:
                if not self._path(number).is_file():
                    yield Part(number, first, waiting)
                number, first, waiting = number + 1, first + len(waiting), []

    def add(self, part: Part, images: Mapping[Point, Tensor]) -> None:
        """Judge the images (N,3,H,W) of every point of one part, and write what is kept of them."""
        kept: dict[str, Tensor] = {}
        for i, point in enumerate(self.points):
            kept |= {f"{i} {name}": values for name, values in self.judges.judge(images[point], part.prompts).items()}
        partial = self._path(part.number).with_suffix(".partial")
        save_file(kept, partial, {"pixels": str(images[BASE].shape[-1])})
        os.replace(partial, self._path(part.number))

    @property
    def pixels(self) -> int:
        """The width of the images that were judged."""
        with safe_open(self._path(0), "pt") as file:
            return int(file.metadata()["pixels"])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, point: Point, name: str) -> Iterator[Tensor]:
        """One kind of value of one point, part by part."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                yield file.get_tensor(f"{self.points.index(point)} {name}")

    def _by_prompt(self, point: Point, name: str) -> Iterator[Tensor]:
        """The same, prompt by prompt; the prompts of a part are whole."""
        counts = iter(self.counts.values())
        for values in self._read(point, name):
            while len(values):
                n = next(counts)
                yield values[:n]
                values = values[n:]

    def summarise(self, real: Mapping[str, Iterable[Tensor]] | None = None) -> dict[str, Any]:
        """Every figure of every point, frontiers, and 95 % intervals; `real` are features of real images, part by part.

        Figures of the first feature extractor are `diversity`, `vendi`, `fid`, `kid`, `logcov`; those of another, `<its name>_…`.
        Without real images the distances are to the base's, which has none to itself.
        """
        clouds: dict[str, FeatureStatistics] = {}
        if real is not None:
            for name, parts in real.items():
                clouds[name] = FeatureStatistics()
                for seen in parts:
                    clouds[name].update(seen, [0] * len(seen))
        base_clouds = {name: self._cloud(BASE, name) for name in self.judges.features}
        references = clouds if real is not None else base_clouds
        base_far = _Far(base_clouds, references, real is None)
        base_figures = base_far.figures()
        base = self._judged(BASE, base_figures)
        judged: dict[Point, Judged] = {BASE: base}
        rows: dict[Point, dict[str, float]] = {BASE: {**base.means(), **({} if real is None else base_figures)}}
        differences: list[dict[str, Any]] = []
        absolute: list[dict[str, Any]] = [{"model": "base", **intervals(base), **({} if real is None else base_far.intervals())}]
        for point in self.points[1:]:
            mine = {name: self._cloud(point, name) for name in self.judges.features}
            far = _Far(mine, references, real is None)
            figures = far.figures()
            judged[point] = self._judged(point, figures)
            rows[point] = {**judged[point].means(), **figures}
            here = {"model": point[0], "k": point[1]}
            differences.append({**here, **intervals(judged[point], base), **far.intervals(base_far if real is not None else None)})
            absolute.append({**here, **intervals(judged[point]), **far.intervals()})
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

    def _cloud(self, point: Point, name: str) -> FeatureStatistics:
        cloud = FeatureStatistics()
        for number, rows in enumerate(self._by_prompt(point, f"features {name}")):
            cloud.update(rows, [number] * len(rows))
        return cloud

    def _judged(self, point: Point, far: Mapping[str, float]) -> Judged:
        rewards = {name: torch.stack([v.double().mean() for v in self._by_prompt(point, f"reward {name}")]) for name in self.judges.rewards}
        spread: dict[str, Tensor] = {}
        for name in self.judges.features:
            diversity, vendi = Diversity(), list[float]()
            for number, rows in enumerate(self._by_prompt(point, f"features {name}")):
                diversity.update(rows, [number] * len(rows))
                vendi.append(vendi_score(rows))
            spread[self._named(name, "diversity")] = torch.stack(list(diversity.values().values()))
            spread[self._named(name, "vendi")] = torch.tensor(vendi, dtype=torch.float64)
        if self.judges.lpips is not None:
            spread["lpips_diversity"] = torch.cat(list(self._read(point, "lpips"))).double()
        return Judged(rewards, spread.pop("diversity"), far["fid"], far["logcov"], spread)

    def _named(self, feature: str, figure: str) -> str:
        return figure if feature == next(iter(self.judges.features)) else f"{feature}_{figure}"

    def clear(self) -> None:
        """Delete what was kept."""
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class _Far:
    """The distances of one point under every feature extractor; `paired` where the reference has the same prompts."""

    mine: Mapping[str, FeatureStatistics]
    references: Mapping[str, FeatureStatistics]
    paired: bool

    def figures(self, block: int | None = None) -> dict[str, float]:
        found: dict[str, float] = {}
        for i, (name, cloud) in enumerate(self.mine.items()):
            far = distances(cloud, self.references[name], block, self.paired)
            found |= {metric if i == 0 else f"{name}_{metric}": value for metric, value in far.items()}
        return found

    def intervals(self, base: _Far | None = None) -> dict[str, list[float]]:
        """Of the distances or, where a base is given, of their difference to its own."""

        def statistic(block: int | None) -> dict[str, float]:
            off = base.figures(block) if base is not None else {}
            return {name: value - off.get(name, 0.0) for name, value in self.figures(block).items()}

        return jackknife(statistic, next(iter(self.mine.values())).blocks)
