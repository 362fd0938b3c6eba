"""The part of the embedded proxy that reads the prompt (LongAlign), as a reward to train on."""

from __future__ import annotations

from pathlib import Path

from ..reward import Reward
from ..rewards.decomposed import CommonText
from ..rewards.registry import load, tower_hash
from ..rewards.weighted import Standardised
from . import files, world


def relevant(out: Path, omega: float) -> str:
    """The name of the proxy's part that reads the prompt; its file, of 1000 training captions, is written into `out`."""
    path = out / f"relevant-{omega:g}.json"
    texts = list(dict.fromkeys(caption.text for caption in world.captions(1000, "train")))
    CommonText.of(files.load_tower("proxy"), "demo-proxy", tower_hash("demo-proxy"), texts, omega, False).write(path)
    return f"relevant@{path}"


def in_units_of_the_proxy(name: str) -> Reward:
    """The reward that `relevant` named, in standard deviations of the proxy."""
    return Standardised(load(name).reward, *(files.load_tower("proxy").statistics or (0.0, 1.0)))
