"""Names of network modules in LoRA files, spelled and read back to those of diffusers.

kohya: `lora_unet_a_b.lora_down.weight` with an `.alpha` per module; ComfyUI and diffusers load it for UNets.
diffusers: `unet.a.b.lora_A.weight` or `transformer.a.b.lora_A.weight` with the scale inside B; both load it for transformers.
peft: `base_model.model.a.b.lora_A.weight`, in a folder with `adapter_config.json`.
original: as diffusers', by the names that the network's authors gave: `diffusion_model.a.b.lora_A.weight`; both load it for Anima.
native: `diffusion_model.a.b.lora_down.weight` with an `.alpha`, by the network's own names; ComfyUI loads it for every model.
delta (full fine-tuning): tuned − base as `lora_unet_a_b.diff` for a weight and `.diff_b` for a bias; ComfyUI loads it as a LoRA.

Foreign names are read too: SDXL's original block numbers, the fused projections of FLUX and SD3 files, OneTrainer's
`lora_transformer_`. Whether the network has a module of that name is for the caller to check.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .cosmos import from_cosmos, to_cosmos

Rows = slice | list[int]
"""Some rows of a matrix."""

_KOHYA = "lora_unet_"
_DOWN_UP = (".lora_down.weight", ".lora_up.weight")
_A_B = (".lora_A.weight", ".lora_B.weight")
HALVES = {"kohya": _DOWN_UP, "native": _DOWN_UP, "diffusers": _A_B, "original": _A_B, "peft": _A_B}
"""Suffixes of (down, up) by layout."""
SCALED = ("diffusers", "original")
"""Layouts with the scale alpha/rank inside B."""

SUFFIXES = {
    **dict(zip(_DOWN_UP, ("down", "up"))),
    **dict(zip(_A_B, ("down", "up"))),
    **{".lora_A.default.weight": "down", ".lora_B.default.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up"},
    **{"_lora.down.weight": "down", "_lora.up.weight": "up"},  # diffusers before peft: `….processor.to_q_lora.down.weight`
    **{".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up", ".lora_A": "down", ".lora_B": "up"},
    ".lora_mid.weight": "mid",
}
"""Every suffix in use, and which half it names; `mid` is LoCon's kernel between two 1×1 halves."""

OTHERS = {
    "LoHa": r"\.hada_[wt]",
    "LoKr": r"\.lokr_[wt]",
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "IA3": r"\.(on_input|ia3_\w)",
    "GLoRA": r"\.[ab][12]\.weight$",
    "OFT": r"\.(oft_|boft_)",
    "weight differences": r"\.(diff|diff_b|w_norm|b_norm|set_weight)$",
    "biases": r"\.bias$",
    "a change of shape": r"\.reshape_weight$",
}
"""Patterns of the tensors of adapters that are not plain LoRA, by their name."""

_DELTA = {"weight": ".diff", "bias": ".diff_b"}


def stem(module: str, layout: str, root: str = "unet") -> str:
    """A module's key in a file, without suffix; `root` as of `root_of`."""
    if layout == "kohya":
        return _KOHYA + module.replace(".", "_")
    if layout == "original":
        return "diffusion_model." + to_cosmos(module)
    return {"diffusers": root, "peft": "base_model.model", "native": "diffusion_model"}[layout] + "." + module


def root_of(modules: Iterable[str]) -> str:
    """What diffusers calls the network that has these modules: `unet` or `transformer`."""
    return "unet" if any(name.startswith(_UNET) for name in modules) else "transformer"


def of_parameter(name: str) -> tuple[str, str]:
    """peft's `<module>.lora_A.<adapter>.weight` -> module, `down` or `up`."""
    module, half = name.split(".lora_")
    return module, "down" if half.startswith("A") else "up"


def adapter_of_parameter(name: str) -> str:
    """The adapter of such a name; peft calls the first one `default`."""
    adapter = name.split(".")[-2]
    return "tuned" if adapter == "default" else adapter


def parameter(module: str, adapter: str) -> tuple[str, str]:
    """The names of both halves of a module's update, the inverse of the two above."""
    peft = "default" if adapter == "tuned" else adapter
    return f"{module}.lora_A.{peft}.weight", f"{module}.lora_B.{peft}.weight"


def delta_key(parameter: str) -> str:
    """A UNet parameter's key in a delta file."""
    module, _, kind = parameter.rpartition(".")
    return stem(module, "kohya") + _DELTA[kind]


def of_delta(key: str) -> str:
    """The parameter's name of a delta file's key."""
    module, _, suffix = key.rpartition(".")
    return f"{plain(module)}.{next(kind for kind, s in _DELTA.items() if s == '.' + suffix)}"


def is_delta(keys: Collection[str]) -> bool:
    """Whether a file with these keys holds weight differences and nothing else."""
    return len(keys) > 0 and all(k.endswith(tuple(_DELTA.values())) for k in keys)


# -- reading names -----------------------------------------------------------------------------------------------------

_UNET = ("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding")
# Names that contain an underscore, which kohya's spelling does not tell from a dot
_WORDS = """
down_blocks up_blocks mid_block transformer_blocks conv_in conv_out conv_shortcut conv_norm_out time_embedding add_embedding
time_emb_proj linear_1 linear_2 proj_in proj_out to_q to_k to_v to_qkv to_kv to_out input_blocks middle_block output_blocks in_layers
out_layers emb_layers skip_connection time_embed label_emb
single_transformer_blocks time_text_embed timestep_embedder guidance_embedder text_embedder context_embedder x_embedder pos_embed
norm1_context norm_out ff_context add_q_proj add_k_proj add_v_proj to_added_qkv to_add_out proj_mlp double_blocks single_blocks joint_blocks
x_block context_block img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in vector_in guidance_in in_layer
out_layer final_layer adaLN_modulation
t_embedder y_embedder feed_forward noise_refiner context_refiner cap_embedder all_x_embedder all_final_layer linear_in linear_out
to_qkv_mlp_proj time_guidance_embed double_stream_modulation_img double_stream_modulation_txt single_stream_modulation
text_fusion to_gate layerwise_blocks refiner_blocks time_mod_proj distilled_guidance_layer in_proj out_proj
patch_embed self_attn cross_attn q_proj k_proj v_proj output_proj
adaln_modulation adaln_modulation_self_attn adaln_modulation_cross_attn adaln_modulation_mlp
"""
_SPELLED = re.compile(r"(?:^|_)(" + "|".join(sorted(_WORDS.split(), key=len, reverse=True)) + r"|[^_]+)(?=_|$)")


def plain(stem: str) -> str:
    """A module's name without a layout's prefix and spelling."""
    for prefix in (_KOHYA, "lora_transformer_", "lycoris_"):
        if stem.startswith(prefix):
            return ".".join(_SPELLED.findall(stem.removeprefix(prefix)))
    for prefix in ("base_model.model.", "unet.", "transformer.", "diffusion_model."):
        stem = stem.removeprefix(prefix)
    stem = stem.replace(".processor.", ".")
    if stem.endswith(".to_out") and not stem.startswith("single_transformer_blocks."):  # FLUX.2's is one layer
        return stem + ".0"
    return stem


def canonical(name: str, rows: int, columns: int = 0) -> dict[str, Rows]:
    """diffusers' names for a module of an original checkpoint, and which of its `rows` outputs each one is.

    A name that is diffusers' already stays. Original names are those of the LDM UNet with two residual blocks per level
    (all Stable Diffusion UNets), and of the published FLUX, SD3 and Z-Image transformers, whose attention projections are fused; so
    are those of diffusers after `fuse_qkv_projections`; and those of Anima. Raises ValueError or IndexError for a name or shape of another
    network.
    """
    if found := from_cosmos(name):
        return {found: slice(None)}
    part = name.split(".")
    inner = ".".join(part[-2:]) if part[-2:-1] == ["attention"] else part[-1]
    if inner in _FUSED:
        return _split(name, [".".join([*part[:-1], one]) for one in _FUSED[inner]], rows)
    if part[0].endswith(("_modulation_img", "_modulation_txt", "single_stream_modulation")) and part[-1] == "lin":
        return {f"{part[0]}.linear": slice(None)}
    if part[0] in ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"):
        return {_from_ldm(part): slice(None)}
    if name in _STREAM_ENDS or part[0] in ("double_blocks", "single_blocks", "joint_blocks"):
        names = [_STREAM_ENDS[name]] if name in _STREAM_ENDS else _from_stream(part)
        if "adaLN_modulation" in name and rows == 2 * columns:
            return {names[0]: [*range(columns, rows), *range(columns)]}  # shift and scale there are scale and shift here
        if (end := part[-1] if part[0] == "single_blocks" else ".".join(part[2:])) in _FLUX2 and _FLUX2[end][0] * columns == _FLUX2[end][
            1
        ] * rows:
            return {names[0].rpartition("_blocks.")[0] + f"_blocks.{part[1]}.{_FLUX2[end][2]}": slice(None)}
        if name.endswith(".linear1") and columns and rows != 7 * columns:
            raise ValueError(f"{rows} rows: q, k, v and the MLP of FLUX.1 are 7 times its {columns} columns")
        return _split(name, names, rows, 7 if name.endswith(".linear1") else len(names))  # linear1: q, k, v and a fourfold MLP
    return {name: slice(None)}


_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "attention.qkv": ("to_q", "to_k", "to_v"),  # of the published Z-Image
    "attention.out": ("to_out.0",),
}


def _split(name: str, parts: list[str], rows: int, widths: int = 0) -> dict[str, Rows]:
    """Each part one width of the rows, the last one the rest."""
    width, rest = divmod(rows, widths or len(parts))
    if rest:
        raise ValueError(f"{rows} rows of {name} are not those of {len(parts)} projections")
    edges = [i * width for i in range(len(parts))] + [rows]
    return {n: slice(a, b) for n, a, b in zip(parts, edges, edges[1:])}


_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


def _from_ldm(part: list[str]) -> str:
    whole = ".".join(part)
    if whole in _ENDS:
        return _ENDS[whole]
    if part[0] == "middle_block":
        place, rest = ("mid_block.attentions.0" if part[1] == "1" else f"mid_block.resnets.{int(part[1]) // 2}"), ".".join(part[2:])
    else:
        down = part[0] == "input_blocks"
        level, block = divmod(int(part[1]) - down, 3)
        side, rest = ("down" if down else "up"), ".".join(part[3:])
        if rest in ("op", "conv"):
            return f"{side}_blocks.{level}.{side}samplers.0.conv"
        place = f"{side}_blocks.{level}.{'resnets' if part[2] == '0' else 'attentions'}.{block}"
    return f"{place}.{_RESIDUAL.get(rest, rest)}"


_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_JOINT = {
    "x_block.attn.qkv": _DOUBLE["img_attn.qkv"],
    "context_block.attn.qkv": _DOUBLE["txt_attn.qkv"],
    "x_block.attn.proj": _DOUBLE["img_attn.proj"],
    "context_block.attn.proj": _DOUBLE["txt_attn.proj"],
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": _DOUBLE["img_mlp.0"],
    "x_block.mlp.fc2": _DOUBLE["img_mlp.2"],
    "context_block.mlp.fc1": _DOUBLE["txt_mlp.0"],
    "context_block.mlp.fc2": _DOUBLE["txt_mlp.2"],
    "x_block.adaLN_modulation.1": _DOUBLE["img_mod.lin"],
    "context_block.adaLN_modulation.1": _DOUBLE["txt_mod.lin"],
}


_FLUX2 = {
    "linear1": (9, 1, "attn.to_qkv_mlp_proj"),
    "linear2": (1, 4, "attn.to_out"),
    **{f"{s}_mlp.0": (6, 1, f"ff{c}.linear_in") for s, c in (("img", ""), ("txt", "_context"))},
    **{f"{s}_mlp.2": (1, 3, f"ff{c}.linear_out") for s, c in (("img", ""), ("txt", "_context"))},
}
"""FLUX.2's gated blocks, whose names are FLUX.1's: (a, b, diffusers' name) where a · columns = b · rows."""

_TIME, _POOLED = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
_STREAM_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{f"time_in.{side}_layer": f"{_TIME}.linear_{i}" for i, side in ((1, "in"), (2, "out"))},
    **{f"vector_in.{side}_layer": f"{_POOLED}.linear_{i}" for i, side in ((1, "in"), (2, "out"))},
    **{f"guidance_in.{side}_layer": f"time_text_embed.guidance_embedder.linear_{i}" for i, side in ((1, "in"), (2, "out"))},
    **{f"t_embedder.mlp.{j}": f"{_TIME}.linear_{i}" for i, j in ((1, 0), (2, 2))},
    **{f"y_embedder.mlp.{j}": f"{_POOLED}.linear_{i}" for i, j in ((1, 0), (2, 2))},
}


def _from_stream(part: list[str]) -> list[str]:
    kind, number, rest = part[0], part[1], ".".join(part[2:])
    table = {"double_blocks": _DOUBLE, "single_blocks": _SINGLE, "joint_blocks": _JOINT}[kind]
    blocks = "single_transformer_blocks" if kind == "single_blocks" else "transformer_blocks"
    return [f"{blocks}.{number}.{name}" for name in table.get(rest, (rest,))]
