"""`sample --optimise-noise`: its arguments, and the table that it leaves beside the images."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
from ..models.load import ModelOptions
from ..models.open import open_policy
from ..noise.images import NoiseOptimiser, terms
from ..noise.optimise import Optimised
from ..noise.settings import FEW_STEPS, FIELDS, METHODS, NoiseOptimisation, optimisation_of
from ..policy import Policy
from ..rewards.base import RewardModel
from ..rewards.registry import load_reward, weights_hashes
from ..rewards.weighted import parse_weights
from ..runtime.device import check_device
from ..runtime.files import write_text
from . import searching
from .image_folder import ImageFolder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of noise optimisation to those of `sample`; --reward and --heldout are the search's."""
    group = parser.add_argument_group("noise optimisation by reward", "with --reward, --heldout and --raw of a search")
    group.add_argument("--optimise-noise", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    for f in fields(NoiseOptimisation):
        if f.name in FIELDS:
            having = ", ".join(f"{name} {method.defaults[f.name]}" for name, method in METHODS.items() if f.name in method.defaults)
            kind = {"int": int, "float": float}[str(f.type)]
            text = f"{f.metadata['help']} (default: {having})"
            group.add_argument(f"--noise-{f.name.replace('_', '-')}", type=kind, metavar="X", help=text)


def given(args: argparse.Namespace) -> NoiseOptimisation | None:
    """The optimisation that the arguments describe; None without one."""
    values = {name: value for name in FIELDS if (value := getattr(args, f"noise_{name}")) is not None}
    if args.optimise_noise is None:
        if values:
            raise ConfigError(f"--noise-{next(iter(values)).replace('_', '-')} needs --optimise-noise {'|'.join(METHODS)}")
        return None
    if args.search is not None:
        raise ConfigError("--search and --optimise-noise both choose images by a reward: give one of the two")
    of_search = [f"--{name.replace('_', '-')}" for name in ("budget", "diversity", "image", "lookahead_lora") if getattr(args, name)]
    of_search += [searching.flag(name) for name in searching.FIELDS if getattr(args, f"search_{name}") is not None]
    if of_search:
        raise ConfigError(f"{of_search[0]} belongs to a search: leave it out, or give --search instead of --optimise-noise")
    if not args.reward:
        raise ConfigError("noise optimisation needs a reward: give --reward NAME, see `python -m trainer rewards list`")
    return optimisation_of(args.optimise_noise, values)


@dataclass
class Optimising:
    """One run's noise optimisation: the rewards, the plan, and where the table goes."""

    args: argparse.Namespace
    optimisation: NoiseOptimisation
    reward: RewardModel
    heldout: RewardModel | None
    folder: Path

    @staticmethod
    def open(args: argparse.Namespace, prompts: Sequence[str], folder: ImageFolder) -> Optimising | None:
        """The optimisation of the arguments with its rewards, before a model is loaded; None without one."""
        optimisation = given(args)
        if optimisation is None:
            return None
        device = check_device(args.device)
        reward = load_reward(",".join(args.reward), not args.raw, device)
        heldout = load_reward(args.heldout, not args.raw, device) if args.heldout else None
        if METHODS[optimisation.name].gradient and not reward.differentiable:
            raise ConfigError(f"--optimise-noise {optimisation.name} needs a reward with a gradient: give another --reward, or use rotate")
        if not all(prompts) and any(one.needs_prompt for one in (reward, heldout) if one is not None):
            raise ConfigError("a reward scores an image under its prompt, and a prompt is empty: write one, or give another reward")
        path = folder.path.resolve()
        place = path.with_name(path.name + "-noise")
        if place.exists() and not (args.resume or args.overwrite):
            raise ConfigError(f"{place} exists: add --overwrite to write into it, or --resume to go on with its run")
        return Optimising(args, optimisation, reward, heldout, place)

    def facts(self) -> dict[str, Any]:
        """What the images depend on."""
        args, own = self.args, self.optimisation
        method = {"name": own.name, **{name: getattr(own, name) for name in METHODS[own.name].defaults}}
        hashes = weights_hashes([*args.reward, *([args.heldout] if args.heldout else [])])
        return {"optimise_noise": method, "reward": args.reward, "heldout": args.heldout, "raw": args.raw, "rewards_sha256": hashes}

    def check_memory(self, settings: Generation, guidance_scale: float) -> None:
        """Say what a gradient will take, before the model is loaded; ConfigError where the device has less free."""
        name = self.optimisation.name
        if not METHODS[name].gradient:
            return
        if settings.steps > FEW_STEPS:
            print(
                f"warning: {name} goes through all {settings.steps} steps in each iteration, and is for models of up to {FEW_STEPS}: "
                "use a few-step model or LoRA, or --optimise-noise rotate",
                file=sys.stderr,
            )
        args = self.args
        options = ModelOptions(**{f.name: getattr(args, f.name) for f in fields(ModelOptions)})
        policy = open_policy(args.model, "meta", options, args.image_size)
        reward = meta_reward(",".join(args.reward))
        needed = gradient_bytes(policy, reward, settings, self.optimisation, guidance_scale, args.device) / 1e9
        print(f"{name}: predicted peak memory {needed:.2f} GB")
        if args.device.startswith("cuda"):
            free = torch.cuda.mem_get_info(args.device)[0] / 1e9
            if needed > free:
                raise ConfigError(
                    f"--optimise-noise {name} takes {needed:.1f} GB and {args.device} has {free:.1f} GB free: use fewer --steps, "
                    "a smaller --image-size, --dtype bfloat16, or rotate, which needs no gradient"
                )

    def optimiser(
        self, policy: DiffusersPolicy, settings: Generation, mix: Mix, models: Mapping[str, DiffusersPolicy], levels: Tensor
    ) -> NoiseOptimiser:
        """The optimiser on a policy."""
        if METHODS[self.optimisation.name].gradient:
            for each in (policy, *models.values()):
                each.gradient_checkpointing(denoiser=True, vae=True)
        others: Mapping[str, Policy] = models
        return NoiseOptimiser(policy, mix, levels, settings, self.optimisation, terms(self.reward), others)

    def draw(self, optimiser: NoiseOptimiser, prompts: Sequence[str], folder: ImageFolder) -> int:
        """Optimise and write the images that are not in the folder; returns their number."""
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        cost, missing = optimiser.cost, folder.missing(range(len(prompts)))
        print(f"{self.optimisation.name}: {cost.model} model calls, {cost.decodes} decodes, {cost.rewards} reward calls an image")
        with tqdm(total=len(prompts), initial=len(prompts) - len(missing), unit="image", disable=not sys.stderr.isatty()) as bar:
            for i in missing:
                found = optimiser(prompts[i], i)
                heldout = "" if self.heldout is None else f"{self._heldout(found, prompts[i]):.6g}"
                write_text(self._table(found, heldout), self.folder / f"{i:05d}.csv")
                folder.write(i, found.image[0], prompts[i])
                first = found.history[0].total
                held = f", held-out {heldout}" if heldout else ""
                print(f"{prompts[i]}: reward {first:.3f} at first, {found.best.total:.3f} at iteration {found.best.iteration}{held}")
                bar.update(1)
        return len(missing)

    @torch.no_grad()
    def _heldout(self, found: Optimised, prompt: str) -> float:
        assert self.heldout is not None
        return float(self.heldout(found.image.to(self.args.device), [prompt])[0])

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
