"""The two parts of `sample`: what the arguments say of each, checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..generate import Generation
from ..guidance import Slot, Switch
from ..lora.extract import weight_files
from ..lora.file import lora_weights, read_metadata
from ..lora.several import Strengths, load_loras, parse_strength
from ..models.diffusers_policy import DiffusersPolicy
from ..models.second import states_schedule, with_network
from ..models.two_unets import TUNED_UNET
from ..runtime.files import files_hash
from .options import finite

BASE_PART = "base_part"
"""The adapter of the LoRAs of the base's part."""


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the models and the conditioning of both parts."""
    add = parser.add_argument
    lora = "a LoRA of the tuned part and its strength; may be given several times, all are added (default: none)"
    add("--lora", "--tuned-lora", action="append", default=[], metavar="FILE[:X]", help=lora)
    add(
        "--strength", type=finite, default=1.0, metavar="X", help="strength of LoRAs of the tuned part without one of their own (default 1)"
    )
    model = (
        "the tuned part's own network, for a turbo model after its base: a diffusers folder, its unet or transformer folder, or a "
        "checkpoint of the model's family (default: fine_tuned_unet in the model's folder, if there)"
    )
    add("--tuned-model", "--tuned-unet", dest="tuned_model", type=Path, metavar="PATH", help=model)
    parts = "diffusers folder with the schedule of a --tuned-model that is a file of the network alone"
    add("--tuned-parts", type=Path, metavar="FOLDER", help=parts)
    add_conditioning(parser)


def add_conditioning(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the base's LoRAs, and of the prompts of both parts."""
    add = parser.add_argument
    lora = "a LoRA of the base's part and its strength; may be given several times. One for both parts is given to both"
    add("--base-lora", action="append", default=[], metavar="FILE[:X]", help=lora)
    prompt = "the tuned part's prompt, where {prompt} stands for the image's own: '{prompt}, trigger word' (default: the image's own)"
    add("--tuned-prompt", default="{prompt}", metavar="TEXT", help=prompt)
    add("--negative", default="", metavar="TEXT", help="negative prompt of parts with guidance (default: the empty prompt)")
    add("--tuned-negative", metavar="TEXT", help="the tuned part's negative prompt (default: as --negative)")


@dataclass(frozen=True)
class TwoParts:
    """Which networks, LoRAs and prompts the base's and the tuned part have."""

    base_loras: Strengths
    loras: Strengths
    whole: Path | None
    """The tuned part's own network."""
    schedule: Path | None
    """A diffusers folder with its schedule."""
    tuned_prompt: str
    negative: str
    tuned_negative: str

    @property
    def tuned(self) -> bool:
        """Whether there is a tuned part."""
        return bool(self.loras) or self.whole is not None

    def slots(self, settings: Generation) -> tuple[Slot, Slot]:
        """The denoisers of the base's and the tuned part."""
        base = replace(settings.base, adapter=BASE_PART if self.base_loras else "base", negative=self.negative)
        tuned = settings.tuned(model="tuned" if self.whole else "")
        return base, replace(tuned, prompt=self.tuned_prompt, negative=self.tuned_negative)

    def load(self, policy: DiffusersPolicy, settings: Generation, network: DiffusersPolicy | None = None) -> Mapping[str, DiffusersPolicy]:
        """Load networks and LoRAs; returns the policies besides `policy`, by the names in slots.

        network: a policy whose network, of the same shapes, stands for the second one, which is not read.
        """
        parts = self.schedule or ""
        if self.whole and settings.tuned_steps and not states_schedule(policy, self.whole, parts):
            raise ConfigError(
                f"{self.whole} is a network without a schedule, which --tuned-steps needs: give --tuned-parts FOLDER, a diffusers folder "
                "of that model"
            )
        models = {"tuned": with_network(policy, self.whole, parts, network and network.network)} if self.whole else {}
        if self.base_loras:
            load_loras(policy, self.base_loras, BASE_PART)
        if self.loras:
            load_loras(models.get("tuned", policy), self.loras)
        return models

    def switch(self, text: str) -> Switch | None:
        """Where the tuned part takes over; None without one."""
        if not self.tuned:
            return None
        if text != "auto":
            return Switch.parse(text)
        recommended = {path: read_metadata(path).get("switch_sigma") for path, _ in self.loras}
        if self.whole is not None:
            raise ConfigError(f"{self.whole} recommends no switch: give --switch (ImageReFL's authors: 75% for SD1.5, 87.5% for SDXL)")
        found = {float(sigma) for sigma in recommended.values() if isinstance(sigma, int | float)}
        if len(found) != 1:
            raise ConfigError(
                f"{', '.join(map(str, recommended))} recommends {'several switches' if found else 'no switch'}: give --switch"
            )
        return Switch(sigma=found.pop())

    @property
    def facts(self) -> dict[str, Any]:
        """What the images depend on, by the keys of earlier versions where those had one."""
        files = {"tuned_unet": weight_files(self.whole)} if self.whole else {}
        return {
            **{"lora": "", "strength": 1.0, **_facts(self.loras, "")},
            "tuned_unet": str(self.whole or ""),
            **({"tuned_parts": str(self.schedule)} if self.schedule else {}),
            **{f"{name}_sha256": files_hash(paths) for name, paths in files.items()},
            **self.conditioning_facts,
        }

    @property
    def conditioning_facts(self) -> dict[str, Any]:
        """The base's LoRAs and the prompts, where they are set."""
        prompts = {"tuned_prompt": self.tuned_prompt, "negative": self.negative, "tuned_negative": self.tuned_negative}
        plain = {"tuned_prompt": "{prompt}", "negative": "", "tuned_negative": self.negative}
        return {**_facts(self.base_loras, "base_"), **{name: value for name, value in prompts.items() if value != plain[name]}}


def _facts(files: Strengths, prefix: str) -> dict[str, Any]:
    if not files:
        return {}
    paths, strengths = [str(path) for path, _ in files], [strength for _, strength in files]
    single = len(files) == 1
    return {
        f"{prefix}lora": paths[0] if single else paths,
        f"{prefix}strength": strengths[0] if single else strengths,
        f"{prefix}lora_sha256": files_hash([lora_weights(path) for path, _ in files]),
    }


def conditioning(args: argparse.Namespace) -> TwoParts:
    """The base's LoRAs and the prompts of both parts, without the tuned one's models."""
    own, base = args.tuned_negative, [parse_strength(text) for text in args.base_lora]
    for path, _ in base:
        read_metadata(path)  # before a model is loaded: raises for what is not there
    return TwoParts(base, [], None, None, args.tuned_prompt, args.negative, args.negative if own is None else own)


def two_parts(args: argparse.Namespace) -> TwoParts:
    """The parts that the arguments describe; `guiding` refuses the settings of theirs that no guide would read."""
    published = Path(args.model) / TUNED_UNET
    loras = [parse_strength(text, args.strength) for text in args.lora]
    whole = args.tuned_model or (published if not loras and published.is_dir() else None)
    parts = replace(conditioning(args), loras=loras, whole=whole, schedule=args.tuned_parts)
    for path, _ in parts.loras:
        read_metadata(path)
    if args.tuned_parts is not None and whole is None:
        raise ConfigError("--tuned-parts is of a tuned model: give --tuned-model PATH")
    return parts
