"""The layout of a full fine-tune's file: tuned − base of every changed weight, as ComfyUI's stock LoRA loader adds them.

A UNet's `a.b.weight` is `lora_unet_a_b.diff`, its `a.b.bias` is `lora_unet_a_b.diff_b`. It does not know a model.
"""

from __future__ import annotations

from collections.abc import Collection

_KINDS = {"weight": ".diff", "bias": ".diff_b"}


def key(name: str) -> str:
    """A UNet parameter's name in the file."""
    module, _, kind = name.rpartition(".")
    return f"lora_unet_{module.replace('.', '_')}{_KINDS[kind]}"


def stem_and_kind(key: str) -> tuple[str, str]:
    """A module's name as the file spells it, and `weight` or `bias`."""
    stem, _, suffix = key.rpartition(".")
    return stem, next(kind for kind, s in _KINDS.items() if s == "." + suffix)


def is_delta(keys: Collection[str]) -> bool:
    """Whether a file of these keys holds whole differences and nothing else."""
    return len(keys) > 0 and all(k.endswith(tuple(_KINDS.values())) for k in keys)
