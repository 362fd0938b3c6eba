"""Configs: frozen dataclasses, filled from TOML and `--key=value`, checked against their own types and ranges."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

from .text import CONTROL, read_text

T = TypeVar("T")

_BACKSLASHES = "write a path with backslashes in single quotes, or with forward slashes"

NAMES: dict[str, tuple[str, str]] = {
    "guidance_scale": ("guidance", "cfg"),
    "tuned_guidance_scale": ("tuned_guidance", "tuned_cfg"),
    "learning_rate": ("lr", "learning_rate"),
    "batch_size": ("batch", "batch_size"),
    "gradient_accumulation_steps": ("accumulate", "grad_accumulation_steps"),
    "lr_warmup_steps": ("warmup", "lr_warmup_steps"),
    "standardise": ("normalise", "standardise"),
    "gradient_checkpointing_denoiser": ("checkpoint_denoiser", "gradient_checkpointing"),
    "gradient_checkpointing_vae": ("checkpoint_decoder", "gradient_checkpointing_vae"),
    "gradient_checkpointing_reward": ("checkpoint_reward", "gradient_checkpointing_reward"),
    "vae_slicing": ("slice_decoder", "vae_slicing"),
}
"""Keys that have several names: the key here, in version 0.1.0, and in ComfyUI's own nodes (for display)."""
RENAMED = {old: key for key, (old, _) in NAMES.items()}
"""The keys of version 0.1.0. They stay valid in TOML files, on the command line, in node inputs and in checkpoints."""


class ConfigError(ValueError):
    """A config that names an unknown key, or a value of the wrong type or range."""


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of a dataclass from plain values; unknown keys, wrong types and ranges are errors that say what is valid."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(typing.cast(Any, cls)) if f.init}
    values = renamed(values, known, where)
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {where + key!r}; {_nearest(key, known, hints, where)}")
    given: dict[str, Any] = {}
    for name, value in values.items():
        given[name] = _convert(value, hints[name], where + name)
        _check_range(given[name], known[name].metadata, where + name)
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"missing key {where + missing[0]!r}")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where.rstrip('.') or 'config'}: {error}") from error


class HasDefaults(Protocol):
    """A row of a table of methods."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The fields that the method has, with their defaults."""
        ...


def of_method(cls: type[T], methods: Mapping[str, HasDefaults], name: str, given: Mapping[str, Any], kind: str) -> T:
    """The settings of the method `name` from those that are given; ConfigError for a field that it lacks, or a value out of range.

    cls: a dataclass of the fields of all methods and `name`. kind: what a method is called in messages.
    """
    if name not in methods:
        raise ConfigError(f"unknown {kind} {name!r}: use one of {', '.join(methods)}")
    defaults = methods[name].defaults
    for key in given:
        if key not in defaults:
            raise ConfigError(f"{name} has no {key}: it takes {', '.join(defaults)}")
    return build(cls, {**defaults, **given, "name": name})


def likely(name: str, known: Collection[str]) -> str:
    """`did you mean diffusion-dpo? ` for `dpo`: the known name of which it is a part, else the one most like it; nothing where none is."""
    like = [one for one in known if name in one.split("-")] or difflib.get_close_matches(name, known, 1, 0.7)
    return f"did you mean {like[0]}? " if like else ""


def _nearest(key: str, known: Collection[str], hints: Mapping[str, Any], where: str) -> str:
    """The valid key, of this dataclass or of a table in it, that is most like `key`; all keys where none is."""
    names = {f.name: f"{table}.{f.name}" for table in known if is_dataclass(hints[table]) for f in fields(hints[table])}
    names |= {old: new for old, new in RENAMED.items() if new in known}
    names |= {name: name for name in known}
    like = difflib.get_close_matches(key, names, 1, 0.7)
    return f"did you mean {where}{names[like[0]]}?" if like else f"valid keys are {', '.join(sorted(known))}"


def renamed(values: Mapping[str, Any], known: Collection[str], where: str = "") -> dict[str, Any]:
    """The values with the keys of 0.1.0 replaced by today's; a key given under both names is an error."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = RENAMED[key] if key not in known and RENAMED.get(key) in known else key
        if name in result:
            raise ConfigError(f"{where + name} is given twice: {NAMES[name][0]!r} is its old name")
        result[name] = value
    return result


def present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint or `config.json`, tables included, with the keys of 0.1.0 replaced by today's."""
    result = renamed(settings, RENAMED.values())
    return {key: present_names(typing.cast(dict[str, Any], value)) if isinstance(value, dict) else value for key, value in result.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: use one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        return tuple(_convert(v, arguments[0], where) for v in typing.cast(Sequence[Any], value))
    if origin is dict or is_dataclass(hint):
        return _table(value, hint, where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str and number:
        return str(value)  # `--watch.switch=12`: TOML reads a number
    if hint is float and number:
        if not math.isfinite(value):
            raise ConfigError(f"{where} = {value}: expected a finite number")
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _table(value: Any, hint: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(value, typing.cast(type[Any], hint)):
        return value
    if not isinstance(value, dict):
        key = f"{fields(hint)[0].name}=…" if is_dataclass(hint) else f"name={value}"
        raise ConfigError(f"{where} = {value!r}: expected a table, write --{where}.{key}")
    return build(typing.cast(type[Any], hint), typing.cast(dict[str, Any], value), where + ".") if is_dataclass(hint) else value


def _check_range(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if "min" in metadata and value < metadata["min"]:
        raise ConfigError(f"{where} = {value}: give at least {metadata['min']}")
    if "max" in metadata and value > metadata["max"]:
        raise ConfigError(f"{where} = {value}: give at most {metadata['max']}")


def plain(config: Any) -> Any:
    """A dataclass as nested dictionaries of plain values, tuples as lists."""
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [plain(v) for v in typing.cast(Sequence[Any], config)]
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary."""
    if not path.is_file():
        raise ConfigError(f"no config file {path}")
    try:
        text = read_text(path).replace("\r\n", "\n")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: its lists or tables are nested too deep") from error
    except ValueError as error:  # of the syntax, or of a number with thousands of digits
        at = re.search(r"at line (\d+)", str(error))
        line = text.split("\n")[int(at[1]) - 1] if at else text
        hint = f"; {_BACKSLASHES}" if re.search(r'"[^"]*\\', line) else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from error
    _check_backslashes(values, f"{path}: ")
    return values


def _check_backslashes(value: Any, where: str) -> None:
    r"""Raise ConfigError where a text has control characters: `"D:\train"` in TOML holds a tab and no backslash."""
    if isinstance(value, dict):
        for key, item in typing.cast(dict[str, Any], value).items():
            _check_backslashes(item, f"{where}{'' if where.endswith((' ', '-')) else '.'}{key}")
    elif isinstance(value, list):
        for item in typing.cast(list[Any], value):
            _check_backslashes(item, where)
    elif isinstance(value, str) and CONTROL.search(value):
        raise ConfigError(f"{where} = {value!r} holds a control character, as \\t in double quotes is a tab: {_BACKSLASHES}")


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy with `--a.b=value` applied, keys under today's names; the value is read as TOML, or as a string where TOML cannot."""
    result = present_names(values)
    for assignment in assignments:
        if not assignment.startswith("--") or "=" not in assignment:
            raise ConfigError(f"{assignment!r}: write --key=value, or --table.key=value")
        key, text = assignment[2:].split("=", 1)
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except (ValueError, RecursionError):
            value = text
        _check_backslashes({key: value}, "--")
        place: Any = result
        *tables, name = key.replace("-", "_").split(".")
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{assignment!r}: {table} = {place!r} is not a table")
        place[RENAMED.get(name, name)] = value
    return result
