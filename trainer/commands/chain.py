"""The chain of sampler steps of `sample`: which of the models takes which step, and on which noise levels."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from ..config import ConfigError
from ..generate import Generation
from ..guidance import Mix, Switch, cfg, combined
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from ..models.open import open_policy
from .guiding import Guiding, guiding
from .options import warn_of_guidance
from .two_parts import TwoParts, two_parts


@dataclass(frozen=True)
class Steps:
    """A chain on models: a policy and others by the names in slots, their noise levels (T+1,) and mix, and the tuned part's steps."""

    policy: DiffusersPolicy
    models: Mapping[str, DiffusersPolicy]
    levels: Tensor
    mix: Mix
    k: int | None
    end: int | None


@dataclass(frozen=True)
class Chain:
    """What the arguments say of the steps, checked before a model is loaded."""

    settings: Generation
    parts: TwoParts
    guide: Guiding | None
    switch: Switch | None
    until: Switch | None

    @staticmethod
    def of(args: argparse.Namespace, settings: Generation) -> Chain:
        """The chain of the arguments; ConfigError for what no step would read."""
        parts = two_parts(args)
        guide = guiding(args, parts, settings)
        if guide is None:
            warn_of_guidance(args, settings, [path for path, _ in parts.loras])
        switch, until = (None, None) if guide else (parts.switch(args.switch), _until(args, parts))
        return Chain(settings, parts, guide, switch, until)

    def on(self, policy: DiffusersPolicy, network: DiffusersPolicy | None = None) -> Steps:
        """The chain on a policy, to which LoRAs are attached; for `network` see TwoParts.load."""
        settings = self.settings
        models = self.parts.load(policy, settings, network)
        levels, k = _schedule(policy, models.get("tuned", policy), settings, self.switch, self.until)
        end = self.until.index(levels) if self.until else None
        if k is not None and end is not None and end <= k:
            raise ConfigError(f"no step lies between --switch, step {k}, and --until, step {end}")
        base, tuned = self.parts.slots(settings)
        if self.guide is not None:
            mix = self.guide.mix(self.parts, settings, levels)
        else:
            mix = cfg(base) if k is None else combined(base, tuned, k, end)
        return Steps(policy, models, levels, mix, k, end)

    def on_meta(self, args: argparse.Namespace) -> Steps:
        """The chain on models without values, whose memory can be counted; a second network is quantised as the first."""
        options = ModelOptions(**{f.name: getattr(args, f.name) for f in fields(ModelOptions)})
        policy = open_policy(args.model, "meta", options, args.image_size)
        second = open_policy(args.model, "meta", options, args.image_size) if self.parts.whole else None
        return self.on(policy, second)


def _schedule(
    policy: DiffusersPolicy, tuned: DiffusersPolicy, settings: Generation, switch: Switch | None, until: Switch | None
) -> tuple[Tensor, int | None]:
    """The noise levels of the run, and the first step of the tuned model; None without one."""
    own = bool(settings.tuned_steps) or settings.tuned_method is not None
    if switch is None or until is not None:
        if own:
            raise ConfigError(
                "--tuned-steps and --tuned-method need a tuned model (--lora, --tuned-model), and cannot be combined with --until"
            )
        levels = policy.sigmas(settings.steps)
        return levels, None if switch is None else switch.index(levels)
    base = policy.sigmas(settings.steps)
    return switch.joined(base, tuned.sigmas(settings.tuned_steps) if settings.tuned_steps else base)


def _until(args: argparse.Namespace, parts: TwoParts) -> Switch | None:
    """Where the base model is back; None if it never is."""
    if args.until is None:
        return None
    if not parts.tuned:
        raise ConfigError("--until ends the tuned model's part: give --lora or --tuned-model")
    return Switch.parse(args.until)
