"""Whether a model is distilled to few steps, by what its files say: pipeline settings, scheduler, and its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .diffusers_policy import DiffusersPolicy
from .load import INDICES, MODELS

_NAME = re.compile(r"(?<!de)(?<!de[-_ ])(turbo|lightning|schnell)|(?<![a-z])(lcm|dmd2?|hyper-?sd(xl)?)(?![a-z])|flux-?2-klein-[49]b")
_CACHE = "models--"
"""How a folder of the hub's cache begins; the model's own folder inside is called by a hash."""


def distilled(policy: DiffusersPolicy, model: str) -> str:
    """Why `model`, which `policy` was opened from, is taken to be distilled to few steps; "" where nothing says so."""
    if reason := policy.distilled():
        return reason
    if model in MODELS or not Path(model).exists():
        return ""
    path = Path(model).resolve()
    names = [path.stem if path.is_file() else path.name, *(part for part in path.parts if part.startswith(_CACHE))]
    found = next((match[0] for name in (*names, _recorded(path)) if (match := _NAME.search(name.lower()))), "")
    return f"its name says {found}" if found else ""


def _recorded(folder: Path) -> str:
    """The name that a diffusers folder records."""
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    return str(json.loads(index.read_text("utf-8")).get("_name_or_path", "")).rsplit("/", 1)[-1] if index else ""


def warning_of(policy: DiffusersPolicy, model: str) -> str:
    """One line on training a distilled model as any other; "" for one that is none."""
    reason = distilled(policy, model)
    if not reason:
        return ""
    return (
        f"{model} is distilled to few steps ({reason}), which training undoes: train its base model and draw with this one "
        "(watch.tuned_model, sample --tuned-model), or give a training adapter (training_adapter = FILE)"
    )
