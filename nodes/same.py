"""Whether two patches are the same, by what they are made of: ComfyUI copies them when it clones a model."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

_Path = tuple[str, ...]


def difference(a: Any, b: Any) -> _Path | None:
    """Where two trees of patches first differ, as the keys that lead there; None if they are the same.

    Functions are the same if they share their code and what they enclose; other objects if they share their class and their state.
    """
    try:
        return _difference(a, b, {})
    except RecursionError:  # too deep to say that they are the same
        return ()


def _difference(a: Any, b: Any, seen: dict[tuple[int, int], Any]) -> _Path | None:
    if a is b or (id(a), id(b)) in seen:
        return None
    seen[id(a), id(b)] = (a, b)  # held, so that no other object takes the id
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {**a, **b}:
            if _is_empty(a.get(name)) and _is_empty(b.get(name)):
                continue
            inner = () if name not in a or name not in b else _difference(a[name], b[name], seen)
            if inner is not None:
                return (str(name), *inner)
        return None
    if type(a) is not type(b):
        return ()
    if isinstance(a, (list, tuple)):
        return () if len(a) != len(b) or any(_difference(x, y, seen) is not None for x, y in zip(a, b)) else None
    return None if _are_same(a, b, seen) else ()


def _is_empty(value: Any) -> bool:
    """Nothing, or containers with nothing in them: setting a patch and taking it away leaves these."""
    inner = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, (dict, list, tuple)) and all(map(_is_empty, inner)))


def _are_same(a: Any, b: Any, seen: dict[tuple[int, int], Any]) -> bool:
    if torch.is_tensor(a):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b))
    if hasattr(a, "is_clone") and hasattr(a, "patches_uuid"):  # a MODEL
        return a.is_clone(b) and a.patches_uuid == b.patches_uuid
    if isinstance(a, types.MethodType):
        parts = [(f.__func__, f.__self__) for f in (a, b)]
    elif isinstance(a, types.FunctionType):
        if a.__code__ is not b.__code__:
            return False
        parts = [(f.__defaults__, f.__kwdefaults__, [_content(cell) for cell in f.__closure__ or ()]) for f in (a, b)]
    elif isinstance(a, functools.partial):
        parts = [(f.func, f.args, f.keywords) for f in (a, b)]
    elif isinstance(a, (type, types.BuiltinFunctionType, types.ModuleType)):
        return False
    elif hasattr(a, "__dict__") and not isinstance(a, (str, bytes, int, float)):
        parts = [vars(a), vars(b)]
    else:
        equal = a == b
        return isinstance(equal, bool) and equal
    return _difference(parts[0], parts[1], seen) is None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
