"""Rewards whose side of the text is read once per prompt, and need not lie on the device while images are scored."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..parking import Parking, inside, slots
from .mps import MPS
from .two_tower import TwoTower


def readers(rewards: Any) -> list[TwoTower | MPS]:
    """The rewards of any nesting that remember what their text towers made of a prompt."""
    return [*inside(rewards, TwoTower), *inside(rewards, MPS)]


def apart_from_texts(rewards: Any) -> Parking:
    """All weights of rewards but those of their text towers, which are parked by themselves."""
    texts = {(id(held), name) for reader in readers(rewards) for held, name in reader.words.slots}
    whole = [slot for module in inside(rewards, nn.Module) for slot in slots(module)]
    return Parking(slot for slot in whole if (id(slot[0]), slot[1]) not in texts)
