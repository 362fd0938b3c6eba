"""Which model a LoRA is for: the known denoisers that have all of its modules, by name and by shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import ConfigError
from ..lora.layouts import Adapter
from ..runtime.embedded import WEIGHTS
from .load import MODELS
from .meta import denoiser_modules

_EMBEDDED = str(WEIGHTS / "pipeline")


def for_family(adapter: Adapter, source: str, model: str = "", also: Sequence[str] = ()) -> tuple[Adapter, str]:
    """The adapter in the shapes of a known model, and what to call it; ConfigError where no model has all of its modules.

    Candidates are the published models, the embedded one and those in `also`, or `model` alone. The shapes of a model of
    the same names and another size stay as they are, except that a 1×1 kernel is a matrix where all candidates have one.
    """
    names = [model] if model else [*MODELS, _EMBEDDED, *also]
    having = {name: modules for name in names if adapter.updates.keys() <= (modules := denoiser_modules(name)).keys()}
    if not having and adapter.family:
        raise ConfigError(f"{source} {adapter.family}")
    if not having:
        nearest = max(names, key=lambda name: len(adapter.updates.keys() & denoiser_modules(name).keys()))
        unknown = [name for name in adapter.updates if name not in denoiser_modules(nearest)]
        raise ConfigError(
            f"{source} is for a model that is not known: nearest is {_called(nearest)}, which lacks {len(unknown)} of its "
            f"{len(adapter.updates)} modules, first {unknown[0]}; known are {', '.join(MODELS)}, or give --model FOLDER"
        )
    fitting: dict[str, Adapter] = {}
    fault = ""
    for name, modules in having.items():
        try:
            fitting[name] = adapter.fitted(modules)
        except ValueError as error:
            fault = str(error)
    if fitting:
        return next(iter(fitting.values())), f"of {', '.join(map(_called, fitting))}"
    if model:
        raise ConfigError(f"{source} {fault}")
    if adapter.family:  # its names are those of models of several families
        raise ConfigError(f"{source} {adapter.family}")
    updates = dict(adapter.updates)
    for name, update in updates.items():
        inner, outer = update.down.shape[1:], {len(modules[name]) for modules in having.values()}
        if len(inner) == 3 and inner[1:].numel() == 1 and outer == {2}:
            updates[name] = update.fitted(update.shape[:2]) or update
    return replace(adapter, updates=updates), f"with names of {', '.join(map(_called, having))} and other shapes"


def fitting(adapter: Adapter) -> list[str]:
    """Published models whose denoisers have all modules of an adapter, in its shapes."""
    names: list[str] = []
    for name in MODELS:
        modules = denoiser_modules(name)
        if adapter.updates.keys() <= modules.keys() and all(update.fitted(modules[key]) for key, update in adapter.updates.items()):
            names.append(name)
    return names


def _called(model: str) -> str:
    return "the embedded model" if model == _EMBEDDED else model
