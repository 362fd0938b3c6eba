"""Names of the modules of Cosmos Predict2, whose network Anima's is: its authors', which ComfyUI keeps, and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

_COSMOS = {
    **{f"{side}_attn.{x}_proj": f"attn{i}.to_{x}" for i, side in ((1, "self"), (2, "cross")) for x in "qkv"},
    **{f"{side}_attn.output_proj": f"attn{i}.to_out.0" for i, side in ((1, "self"), (2, "cross"))},
    **{"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"},
    **{f"adaln_modulation_{n}.{i}": f"norm{k}.linear_{i}" for k, n in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp")) for i in (1, 2)},
}
"""Modules of a block: the authors' names, and diffusers'."""
_COSMOS_ENDS = {
    **{"x_embedder.proj.1": "patch_embed.proj", "final_layer.linear": "proj_out"},
    **{f"final_layer.adaln_modulation.{i}": f"norm_out.linear_{i}" for i in (1, 2)},
    **{f"t_embedder.1.linear_{i}": f"time_embed.t_embedder.linear_{i}" for i in (1, 2)},
}


def from_cosmos(name: str) -> str:
    """diffusers' name of a module of Anima by its authors' name, "" where it is none."""
    blocks, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if blocks == "blocks" and number.isdecimal() and rest in _COSMOS:
        return f"transformer_blocks.{number}.{_COSMOS[rest]}"
    return _COSMOS_ENDS.get(name, "")


def to_cosmos(module: str) -> str:
    """The authors' name of a module of Anima by diffusers' name; ValueError where Anima has none of that name."""
    ends = {here: there for there, here in _COSMOS_ENDS.items()}
    inside = {here: there for there, here in _COSMOS.items()}
    blocks, _, rest = module.partition(".")
    number, _, rest = rest.partition(".")
    if module in ends:
        return ends[module]
    if blocks != "transformer_blocks" or rest not in inside:
        raise ValueError(f"{module} is not a module of Anima")
    return f"blocks.{number}.{inside[rest]}"


def is_cosmos(modules: Iterable[str]) -> bool:
    """Whether the network that has these modules, by diffusers' names, is Anima's: no other here has two attentions so called."""
    return any(re.match(r"transformer_blocks\.\d+\.(attn1|norm\d\.linear_\d)", name) for name in modules)
