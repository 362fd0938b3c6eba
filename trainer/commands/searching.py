"""`sample --search`: its arguments, and the tables and figures that a search leaves beside the images."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import images
from ..generate import Generation
from ..guidance import Mix, Slot
from ..lora.file import load_lora, lora_weights
from ..models.diffusers_policy import DiffusersPolicy
from ..policy import Policy
from ..rewards.two_tower import TwoTower
from ..runtime.files import file_hash, files_hash, replacing, write_text
from ..search.images import Searcher
from ..search.loop import Found
from ..search.plan import check, cost, fitted, rounds_of
from ..search.settings import FIELDS, METHODS, Search, search_of
from .by_reward import Judges, add_settings, facts, folder_beside, given_settings, load_judges
from .image_folder import ImageFolder
from .options import add_remote, finite

_PREFIX = "search_"
_LOOKAHEAD = "lookahead"  # name of the adapter
_STRENGTH = 0.6  # of --image
_OTHERS = ("budget", "diversity", "image", "image_strength", "lookahead_lora")  # flags of no method of its own
_COLUMNS = ("image", "prompt", "reward", "heldout", "model_calls", "decodes", "reward_calls")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a search to those of `sample`."""
    group = parser.add_argument_group("search by reward")
    add = group.add_argument
    add("--search", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("--reward", action="append", metavar="NAME[=WEIGHT]", help="what the search maximises; several times: a sum")
    add("--heldout", metavar="NAME", help="a reward that the search does not see, reported beside it")
    add("--raw", action="store_true", help="search by raw scores: needs no mean and standard deviation")
    add_remote(add)
    add("--budget", type=int, default=0, metavar="N", help="model calls per prompt: as many particles or children as they allow")
    add("--diversity", type=finite, default=0.0, metavar="X", help="return images greedily by reward + X·distance (default 0)")
    add("--image", type=Path, metavar="FILE", help="start from this image, noised, instead of from noise")
    add("--image-strength", type=share, metavar="X", help=f"share of the steps that are run with --image (default {_STRENGTH})")
    add("--lookahead-lora", type=Path, metavar="FILE", help="a few-step LoRA that predicts the image which is scored")
    add_settings(add, Search, METHODS, flag, _PREFIX)


def flag(name: str) -> str:
    """The flag of a setting of a search."""
    return f"--{name}" if name in ("particles", "children") else f"--search-{name}"


def share(text: str) -> float:
    """A share of the steps, as an argument's type."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share of the steps above 0, up to 1")
    return float(text)


def own_flags(args: argparse.Namespace) -> list[str]:
    """The flags of a search alone that are given."""
    others = [f"--{name.replace('_', '-')}" for name in _OTHERS if getattr(args, name)]
    return others + [flag(name) for name in given_settings(args, FIELDS, _PREFIX)]


def given(args: argparse.Namespace) -> Search | None:
    """The search that the arguments describe, before its budget; None without one."""
    values = given_settings(args, FIELDS, _PREFIX)
    if args.search is None:
        flags = [f"--{name}" for name in ("reward", "heldout", "raw") if getattr(args, name)] + own_flags(args)
        if flags:
            raise ConfigError(f"{flags[0]} belongs to a search: give --search {'|'.join(METHODS)}")
        return None
    if not args.reward:
        raise ConfigError("a search needs a reward: give --reward NAME, see `python -m trainer rewards list`")
    for name in values:
        if name not in METHODS[args.search].defaults:
            own = ", ".join(map(flag, METHODS[args.search].defaults))
            raise ConfigError(f"--search {args.search} takes no {flag(name)}: it takes {own}")
    if args.budget < 0 or args.diversity < 0:
        raise ConfigError("--budget and --diversity: give 0 or more")
    if args.image is not None and not args.image.is_file():
        raise ConfigError(f"--image {args.image} does not exist: give an image")
    if args.image_strength is not None and args.image is None:
        raise ConfigError("--image-strength is of --image: give --image FILE")
    if args.budget and METHODS[args.search].grows in values:
        raise ConfigError(f"--budget sets {flag(METHODS[args.search].grows)}: give one of the two")
    values.setdefault("particles", max(args.n, METHODS[args.search].defaults["particles"]))
    return search_of(args.search, values)


@dataclass
class Searching:
    """One run's search: the rewards, the plan, and where tables and figures go."""

    args: argparse.Namespace
    search: Search
    judges: Judges
    folder: Path

    @staticmethod
    def open(args: argparse.Namespace, prompts: Sequence[str], folder: ImageFolder) -> Searching | None:
        """The search of the arguments with its rewards, before a model is loaded; None without one."""
        search = given(args)
        if search is None:
            return None
        place = folder_beside(folder, "search", args)
        return Searching(args, search, load_judges(args, prompts), place)

    @property
    def image_strength(self) -> float:
        """Share of the steps that are run from an image."""
        return _STRENGTH if self.args.image_strength is None else self.args.image_strength

    def facts(self) -> dict[str, Any]:
        """What the images depend on."""
        args, search = self.args, self.search
        found: dict[str, Any] = {"search": {"name": search.name, **{k: getattr(search, k) for k in METHODS[search.name].defaults}}}
        found |= {**facts(args), "budget": args.budget, "diversity": args.diversity}
        if args.image is not None:
            found |= {"image": str(args.image), "image_sha256": file_hash(args.image), "image_strength": self.image_strength}
        if args.lookahead_lora is not None:
            found["lookahead_sha256"] = files_hash([lora_weights(args.lookahead_lora)])
        return found

    def searcher(self, policy: DiffusersPolicy, settings: Generation, mix: Mix, models: Mapping[str, Policy], levels: Tensor) -> Searcher:
        """The search on a policy. ConfigError where it cannot run, or where the budget is too small."""
        args, steps = self.args, len(levels) - 1
        if settings.tuned_method is not None:
            raise ConfigError("--tuned-method cannot be combined with --search: a search has one sampler")
        left = steps if args.image is None else max(1, round(self.image_strength * steps))
        own = args.lookahead_lora is None
        if args.budget:
            self.search = fitted(self.search, left, args.budget, args.n, settings.seed, own)
        rounds = rounds_of(self.search, left, settings.seed)
        check(self.search, rounds, args.n, settings.method == "ddpm", f"--method {settings.method}")
        if args.lookahead_lora is not None:
            if len(rounds) == 1:
                raise ConfigError(f"--lookahead-lora: {self.search.name} scores nothing before the end of this run: leave it out")
            load_lora(policy, args.lookahead_lora, adapter=_LOOKAHEAD)
        source = None if args.image is None else policy.encode(images.load(args.image, policy.image_size)[None])[0]
        sigmas, slot = levels[steps - left :], None if own else Slot(_LOOKAHEAD)
        return Searcher(policy, mix, sigmas, settings, self.search, rounds, self.judges.reward, args.n, models, slot, source, steps - left)

    def cost(self, searcher: Searcher) -> str:
        """What each prompt will take."""
        counts = cost(self.search, searcher.rounds, searcher.lookahead is None)
        widths = [
            f"{name} {getattr(self.search, name)}" for name in ("particles", "children") if name in METHODS[self.search.name].defaults
        ]
        spent = f"{counts.model} model calls, {counts.decodes} decodes, {counts.rewards} reward calls"
        return f"{self.search.name} with {', '.join(widths)}: {spent} a prompt"

    @torch.no_grad()
    def draw(self, searcher: Searcher, prompts: Sequence[str], folder: ImageFolder) -> int:
        """Search and write the images of each prompt that has not all of its; returns the number of new images."""
        from tqdm import tqdm

        new, n = 0, self.args.n
        self.folder.mkdir(parents=True, exist_ok=True)
        print(self.cost(searcher))
        with tqdm(total=len(prompts), unit="image", disable=not sys.stderr.isatty()) as bar:
            for first in range(0, len(prompts), n):
                missing = folder.missing(range(first, first + n))
                if missing:
                    found = searcher(prompts[first], first)
                    chosen, drawn = self._chosen(searcher, found)
                    self._write_tables(first, prompts[first], found, chosen, drawn)
                    for i in missing:
                        folder.write(i, drawn[i - first], prompts[first])
                new += len(missing)
                bar.update(n)
        return new

    def _chosen(self, searcher: Searcher, found: Found) -> tuple[list[int], Tensor]:
        """The places of the images that are returned, and the images; what it takes is counted.

        For --diversity all candidates go through the reward's image tower, where it has one; otherwise their latents are compared.
        """
        tower, counts, n = self.judges.reward.raw, found.counts, self.args.n
        if self.args.diversity == 0 or n == 1 or not isinstance(tower, TwoTower):
            chosen = found.chosen(n, self.args.diversity)
            counts.decodes += n
            return chosen, searcher.decoded(found.latents[chosen])
        drawn = searcher.decoded(found.latents)
        features = [tower.image_features(part.to(self.args.device)).cpu() for part in drawn.split(searcher.chunk)]
        counts.decodes, counts.rewards = counts.decodes + len(drawn), counts.rewards + len(drawn)
        chosen = found.chosen(n, self.args.diversity, torch.cat(features))
        return chosen, drawn[chosen]

    def _write_tables(self, first: int, prompt: str, found: Found, chosen: Sequence[int], drawn: Tensor) -> None:
        """The tree of a prompt as a table and a figure, named as its first image, and the scores of its images in scores.csv."""
        write_text(found.tree.csv(), self.folder / f"{first:05d}.csv")
        with replacing(self.folder / f"{first:05d}.png") as partial:
            found.tree.figure(", ".join(self.args.reward)).savefig(partial, format="png")
        heldout = self.judges.heldout_texts(drawn, prompt, self.args.device)
        counts = found.counts
        for i, place in enumerate(chosen):
            reward = f"{found.scores[place]:.6g}"
            row = (first + i, prompt, reward, heldout[i], counts.model, counts.decodes, counts.rewards)
            self._add_row(row)
        held = f", held-out {', '.join(heldout)}" if self.judges.heldout is not None else ""
        print(f"{prompt}: reward {', '.join(f'{found.scores[i]:.3f}' for i in chosen)}{held}")

    def _add_row(self, row: Sequence[Any]) -> None:
        """Put an image's row into scores.csv, in place of an earlier one."""
        path, rows = self.folder / "scores.csv", dict[str, list[str]]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = {line[0]: line for line in csv.reader(file) if line and line[0] != _COLUMNS[0]}
        rows[str(row[0])] = [str(cell) for cell in row]
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(rows[key] for key in sorted(rows, key=int))
