"""Rewards whose side of the text is read once per prompt, and need not lie on the device while images are scored."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..memory.offload import Parking, inside, slots
from .mps import MPS
from .python_file import PythonReward
from .two_tower import TwoTower


def readers(rewards: Any) -> list[TwoTower | MPS]:
    """The rewards of any nesting that remember what their text towers made of a prompt."""
    return [*inside(rewards, TwoTower), *inside(rewards, MPS)]


def waits(reader: TwoTower | MPS, texts: int) -> bool:
    """Whether a text tower may wait on the CPU in a run of so many texts: more than are remembered would bring it back all the time."""
    return not reader.reads_prompts or texts <= reader.texts_kept


def apart_from_texts(rewards: Any) -> Parking:
    """All weights of rewards but those of their text towers, which are parked by themselves."""
    texts = {(id(held), name) for reader in readers(rewards) for held, name in reader.words.slots}
    own = [module for reward in inside(rewards, PythonReward) for module in inside(reward.function, nn.Module)]
    others = [module for module in inside(rewards, nn.Module) if all(module is not one for one in own)]
    whole = [slot for module in others for slot in slots(module)]
    return Parking([slot for slot in whole if (id(slot[0]), slot[1]) not in texts], own)
