"""The rewards of `pairs`: what ranks images, and the held-out one; checked and tried before anything is drawn."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..pairs.filter import Filter, TextFeatures
from ..pairs.label import Scored
from ..pairs.tables import from_folder
from ..rewards.registry import load, weights_hashes
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import RewardSpec, parse_weights
from ..runtime.files import replacing
from ..scoring.items import Item
from ..scoring.journal import Journal
from ..scoring.scorer import ScoredImage, score
from ..scoring.table import Table
from .pairs_folder import JOURNAL, PairsFolder
from .pairs_source import Source
from .score import check_names

_TRIED = 64  # pixels of the image that every reward scores before anything is drawn


@dataclass(frozen=True)
class Judges:
    """The rewards with their weights, and the held-out one, on a device."""

    parts: tuple[RewardSpec, ...]
    heldout: RewardSpec | None
    raw: bool
    device: str

    @staticmethod
    def open(args: argparse.Namespace, device: str) -> Judges:
        """The rewards of the arguments. ConfigError where they cannot rank images, or are the held-out one."""
        weights = parse_weights(args.reward or ["demo-proxy"])
        without = next((name for name, weight in weights if weight == 0), None)
        if without is not None:
            raise ConfigError(f"--reward {without}=0 ranks nothing: leave it out, or name it in --heldout")
        if args.heldout is not None:
            _check_apart([name for name, _ in weights], args.heldout, args.allow_remote)
        opened = partial(load, device=device, allow_remote=args.allow_remote)
        parts = tuple(replace(opened(name), weight=weight) for name, weight in weights)
        heldout = opened(args.heldout) if args.heldout else None
        check_names([*parts, *([heldout] if heldout else [])])
        for part in parts if not args.raw else ():
            if part.std is None:
                raise ConfigError(
                    f"--reward {part.name} has no mean and standard deviation, in which margins are measured: run "
                    f"`python -m trainer rewards calibrate {part.name} IMAGES`, or add --raw"
                )
        judges = Judges(parts, heldout, args.raw, device)
        judges._try()
        return judges

    def _try(self) -> None:
        """Score an image by every reward. ConfigError where one cannot."""
        image = torch.rand(1, 3, _TRIED, _TRIED, generator=torch.Generator().manual_seed(0)).to(self.device)
        for part in self.all:
            try:
                values = part.reward(image, ["a photo"])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a user's Python file raises anything
                raise ConfigError(
                    f"reward {part.name} cannot score an image: {(str(error).splitlines() or [type(error).__name__])[0]}"
                ) from error
            if tuple(values.shape) != (1,) or not math.isfinite(float(values[0])):
                raise ConfigError(f"reward {part.name} gave {values.tolist()} for one image: a reward gives one finite number for each")

    @property
    def all(self) -> tuple[RewardSpec, ...]:
        """The rewards, the held-out one last."""
        return (*self.parts, *((self.heldout,) if self.heldout else ()))

    @property
    def names(self) -> list[str]:
        """Of the rewards that rank."""
        return [part.name for part in self.parts]

    @property
    def weights(self) -> list[float]:
        """Of the rewards that rank."""
        return [part.weight for part in self.parts]

    @property
    def needs_prompt(self) -> bool:
        """Whether one of them scores an image under its prompt."""
        return any(part.reward.needs_prompt for part in self.all)

    @property
    def facts(self) -> dict[str, Any]:
        """What scores depend on."""
        names = [part.name for part in self.all]
        return {"rewards": names, "weights": weights_hashes(names)}

    @property
    def text_features(self) -> TextFeatures | None:
        """Those of the first two-tower reward; None where there is none."""
        tower = next((part.reward for part in self.all if isinstance(part.reward, TwoTower)), None)
        return None if tower is None else _without_graph(tower)

    def check_value(self, settings: Filter, quality: Mapping[str, float] | None) -> None:
        """ConfigError where pairs cannot be valued as the filter says."""
        if settings.quality_weight and quality is None:
            raise ConfigError("--quality-weight needs the quality of each prompt: give --quality FILE, with columns prompt and quality")
        if settings.diversity_weight and self.text_features is None:
            raise ConfigError(
                "--diversity-weight measures distances of prompts: name a two-tower reward (HPS, PickScore, CLIP) in --heldout"
            )

    def scored(self, source: Source, folder: PairsFolder, batch: int) -> tuple[list[Scored], list[ScoredImage]]:
        """The scores of a source's images, and those that have none, with the error.

        Batches hold the same images in a resumed run, because rounding may depend on the batch: one that is not whole is scored again.
        """
        from tqdm import tqdm

        items = [Item(item.path, item.prompt or "") for item in source.items()]
        journal = Journal(folder.scores, 0, {**self.facts, "batch": batch}, JOURNAL)
        journal.refresh(items)
        known = {(row.path, row.prompt): row for row in journal.finished() if not row.error}
        groups = [items[first : first + batch] for first in range(0, len(items), batch)]
        left = [group for group in groups if any((str(item.path), item.prompt) not in known for item in group)]

        def rows() -> Iterator[ScoredImage]:
            for group in left:
                yield from score(group, self.all, self.device, batch)

        total = sum(map(len, left))
        for row in tqdm(journal.append(rows()), desc="scoring", total=total, disable=not sys.stderr.isatty()):
            known[row.path, row.prompt] = row
        found = [known[str(item.path), item.prompt or ""] for item in items]
        bad = [row for row in found if row.error]
        for row in bad:
            print(f"not scored: {row.error}", file=sys.stderr)
        self._write_table([row for row in found if not row.error], folder.scores)
        return [self._scored(item, row) for item, row in zip(items, found) if not row.error], bad

    def _write_table(self, rows: Sequence[ScoredImage], path: Path) -> None:
        """The scores as `score` writes them; the held-out reward has no share in the sum."""
        table = Table([*self.parts, *([replace(self.heldout, weight=0.0)] if self.heldout else [])], self.raw)
        named = [replace(row, path=from_folder(Path(row.path), path.parent)) for row in rows]
        with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table.write_to(named, file)

    def _scored(self, item: Item, row: ScoredImage) -> Scored:
        values = tuple(self._unit(part, row.raw[part.name]) for part in self.parts)
        return Scored(
            item.path, item.prompt or "", values, None if self.heldout is None else self._unit(self.heldout, row.raw[self.heldout.name])
        )

    def _unit(self, part: RewardSpec, raw: float) -> float:
        """A score in standard deviations, or as it is where these are not wanted or, of the held-out reward, not known."""
        return raw if self.raw or part.mean is None or part.std is None else (raw - part.mean) / part.std


def _without_graph(tower: TwoTower) -> TextFeatures:
    def features(prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return tower.text_features(prompts)

    return features


def _check_apart(names: Sequence[str], heldout: str, allow_remote: bool) -> None:
    """ConfigError where the held-out reward is one that ranks, under this name or another."""
    (name, _), *others = parse_weights(heldout)
    if others or name != heldout:
        raise ConfigError(f"--heldout {heldout}: give one reward, without a weight")
    hashes = weights_hashes([*names, heldout], allow_remote=allow_remote) if heldout not in names else {}
    same = next((name for name in names if name == heldout or (heldout in hashes and hashes.get(name) == hashes[heldout])), None)
    if same is not None:
        raise ConfigError(f"--heldout {heldout} is the reward that ranks, {same}: a held-out reward is another one")
