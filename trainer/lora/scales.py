"""Quantised checkpoints: the names of what a weight must be multiplied by before it is one."""

from __future__ import annotations

import re

_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|pre_quant_scale|SCB"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)|weight_format)$"
)


def is_scale(key: str) -> bool:
    """Whether a tensor of a checkpoint, by its name, belongs to a quantised weight beside it."""
    return _SCALES.search(key) is not None
