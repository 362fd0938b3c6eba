"""`sample --optimise-noise`: its arguments, and the table that it leaves beside the images."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..generate import Generation
from ..guidance import Mix
from ..memory.noise_gradient import gradient_bytes
from ..memory.planner import meta_reward
from ..models.diffusers_policy import DiffusersPolicy
from ..noise.images import NoiseOptimiser, terms
from ..noise.optimise import Optimised
from ..noise.settings import FEW_STEPS, FIELDS, METHODS, NoiseOptimisation, optimisation_of
from ..policy import Policy
from ..rewards.base import RewardModel
from ..rewards.weighted import parse_weights
from ..runtime.files import write_text
from . import searching
from .by_reward import Judges, add_settings, facts, folder_beside, given_settings, load_judges
from .chain import Chain
from .image_folder import ImageFolder

_PREFIX = "noise_"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of noise optimisation to those of `sample`; --reward and --heldout are the search's."""
    group = parser.add_argument_group("noise optimisation by reward", "with --reward, --heldout and --raw of a search")
    group.add_argument("--optimise-noise", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add_settings(group.add_argument, NoiseOptimisation, METHODS, flag, _PREFIX)


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--noise-{name.replace('_', '-')}"


def given(args: argparse.Namespace) -> NoiseOptimisation | None:
    """The optimisation that the arguments describe; None without one."""
    values = given_settings(args, FIELDS, _PREFIX)
    if args.optimise_noise is None:
        if values:
            raise ConfigError(f"{flag(next(iter(values)))} needs --optimise-noise {'|'.join(METHODS)}")
        return None
    if args.search is not None:
        raise ConfigError("--search and --optimise-noise both choose images by a reward: give one of the two")
    if of_search := searching.own_flags(args):
        raise ConfigError(f"{of_search[0]} belongs to a search: leave it out, or give --search instead of --optimise-noise")
    if not args.reward:
        raise ConfigError("noise optimisation needs a reward: give --reward NAME, see `python -m trainer rewards list`")
    return optimisation_of(args.optimise_noise, values)


@dataclass
class Optimising:
    """One run's noise optimisation: the rewards, the plan, and where the table goes."""

    args: argparse.Namespace
    optimisation: NoiseOptimisation
    judges: Judges
    folder: Path

    @staticmethod
    def open(args: argparse.Namespace, prompts: Sequence[str], folder: ImageFolder, chain: Chain) -> Optimising | None:
        """The optimisation of the arguments with its rewards, before a model is loaded; None without one.

        Memory is asked for before the rewards take theirs.
        """
        optimisation = given(args)
        if optimisation is None:
            return None
        place = folder_beside(folder, "noise", args)
        if METHODS[optimisation.name].gradient:
            _check_memory(args, optimisation, chain)
        judges = load_judges(args, prompts)
        _check_gradient(optimisation, judges.reward)  # again: that of a Python file is known now
        return Optimising(args, optimisation, judges, place)

    def facts(self) -> dict[str, Any]:
        """What the images depend on."""
        own = self.optimisation
        method = {"name": own.name, **{name: getattr(own, name) for name in METHODS[own.name].defaults}}
        return {"optimise_noise": method, **facts(self.args)}

    def optimiser(
        self, policy: DiffusersPolicy, settings: Generation, mix: Mix, models: Mapping[str, DiffusersPolicy], levels: Tensor
    ) -> NoiseOptimiser:
        """The optimiser on a policy."""
        if METHODS[self.optimisation.name].gradient:
            for each in (policy, *models.values()):
                each.gradient_checkpointing(denoiser=True, vae=True)
        others: Mapping[str, Policy] = models
        return NoiseOptimiser(policy, mix, levels, settings, self.optimisation, terms(self.judges.reward), others)

    def draw(self, optimiser: NoiseOptimiser, prompts: Sequence[str], folder: ImageFolder) -> int:
        """Optimise and write the images that are not in the folder; returns their number."""
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        cost, missing = optimiser.cost, folder.missing(range(len(prompts)))
        print(f"{self.optimisation.name}: {cost.model} model calls, {cost.decodes} decodes, {cost.rewards} reward calls an image")
        with tqdm(total=len(prompts), initial=len(prompts) - len(missing), unit="image", disable=not sys.stderr.isatty()) as bar:
            for i in missing:
                found = optimiser(prompts[i], i)
                (heldout,) = self.judges.heldout_texts(found.image, prompts[i], self.args.device)
                write_text(self._table(found, heldout), self.folder / f"{i:05d}.csv")
                folder.write(i, found.image[0], prompts[i])
                first = found.history[0].total
                held = f", held-out {heldout}" if heldout else ""
                print(f"{prompts[i]}: reward {first:.3f} at first, {found.best.total:.3f} at iteration {found.best.iteration}{held}")
                bar.update(1)
        return len(missing)

    def _table(self, found: Optimised, heldout: str) -> str:
        """One row for each image that was drawn; the held-out reward is the kept one's."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("start", "iteration", *(name for name, _ in parse_weights(self.args.reward)), "reward", "norm", "kept", "heldout"))
        for row in found.history:
            kept = row == found.best
            values = (*(f"{value:.6g}" for value in row.rewards), f"{row.total:.6g}", f"{row.norm:.6g}")
            writer.writerow((row.start, row.iteration, *values, int(kept), heldout if kept else ""))
        return text.getvalue()


def _check_gradient(optimisation: NoiseOptimisation, reward: RewardModel) -> None:
    if METHODS[optimisation.name].gradient and not reward.differentiable:
        raise ConfigError(f"--optimise-noise {optimisation.name} needs a reward with a gradient: give another --reward, or use rotate")


def _check_memory(args: argparse.Namespace, optimisation: NoiseOptimisation, chain: Chain) -> None:
    """Say what a gradient will take, while nothing is loaded; ConfigError where the device has less free."""
    name, steps = optimisation.name, chain.settings.steps
    if steps > FEW_STEPS:
        print(
            f"warning: {name} goes through all {steps} steps in each iteration, and is for models of up to {FEW_STEPS}: "
            "use a few-step model or LoRA, or --optimise-noise rotate",
            file=sys.stderr,
        )
    reward = meta_reward(",".join(args.reward))
    _check_gradient(optimisation, reward)
    heldout = [meta_reward(args.heldout)] if args.heldout else []
    planned = chain.on_meta(args)
    needed = (
        gradient_bytes(
            planned.policy, reward, chain.settings, optimisation, planned.mix, planned.levels, args.device, planned.models, heldout
        )
        / 1e9
    )
    print(f"{name}: predicted peak memory {needed:.2f} GB")
    if args.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(args.device)[0] / 1e9
        if needed > free:
            raise ConfigError(
                f"--optimise-noise {name} takes {needed:.1f} GB and {args.device} has {free:.1f} GB free: use fewer --steps, "
                "a smaller --image-size, --dtype bfloat16, or rotate, which needs no gradient"
            )
