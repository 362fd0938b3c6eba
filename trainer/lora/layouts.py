"""The layouts that LoRA files come in, as one thing: low-rank updates of modules by diffusers' names.

kohya: `lora_unet_a_b.lora_down.weight` with an `.alpha` per module; ComfyUI and diffusers load it for UNets.
diffusers: `unet.a.b.lora_A.weight` or `transformer.a.b.lora_A.weight` with the scale inside B; both load it for transformers.
peft: a folder of `adapter_model.safetensors` (`base_model.model.a.b.lora_A.weight`) and `adapter_config.json`.

Foreign names are read too: SDXL's original block numbers, the fused projections of FLUX and SD3 files, OneTrainer's
`lora_transformer_`. It does not know a model: whether a module of that name exists is for the caller to check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LAYOUTS = ("kohya", "diffusers", "peft")

Rows = slice | list[int]
"""Some rows of a matrix."""

# Names with an underscore of their own, which kohya's spelling hides
_UNET_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "conv_in", "conv_out", "conv_shortcut", "conv_norm_out"),
    *("time_embedding", "add_embedding", "time_emb_proj", "linear_1", "linear_2", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
    *(
        "input_blocks",
        "middle_block",
        "output_blocks",
        "in_layers",
        "out_layers",
        "emb_layers",
        "skip_connection",
        "time_embed",
        "label_emb",
    ),
)
_TRANSFORMER_WORDS = (
    *("single_transformer_blocks", "time_text_embed", "timestep_embedder", "guidance_embedder", "text_embedder", "context_embedder"),
    *("x_embedder", "pos_embed", "norm1_context", "norm_out", "ff_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *(
        "proj_mlp",
        "double_blocks",
        "single_blocks",
        "joint_blocks",
        "x_block",
        "context_block",
        "img_attn",
        "txt_attn",
        "img_mlp",
        "txt_mlp",
    ),
    *(
        "img_mod",
        "txt_mod",
        "img_in",
        "txt_in",
        "time_in",
        "vector_in",
        "guidance_in",
        "in_layer",
        "out_layer",
        "final_layer",
        "adaLN_modulation",
    ),
)
_SPELLED = re.compile(r"(?:^|_)(" + "|".join(sorted((*_UNET_WORDS, *_TRANSFORMER_WORDS), key=len, reverse=True)) + r"|[^_]+)(?=_|$)")

_HALVES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers before peft: `….processor.to_q_lora.down.weight`
    "_lora.up.weight": "up",
}
_TEXT = ("lora_te", "text_encoder", "text_model")


@dataclass(frozen=True)
class Update:
    """(alpha/rank)·up·down is added to a module's weight: down (rank,in) or (rank,in,kh,kw), up (out,rank) or (out,rank,1,1)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down."""
        return int(self.down.shape[0])

    def scaled_up(self) -> Tensor:
        """up with alpha/rank inside, so that alpha = rank."""
        return self.up * (self.alpha / self.rank)

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """The same update at a higher rank: down and scaled up, filled with zeros, for a scale of 1."""
        down, up = self.down, self.scaled_up()
        more = rank - self.rank
        return torch.cat([down, down.new_zeros(more, *down.shape[1:])]), torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], 1)


@dataclass(frozen=True)
class Adapter:
    """All updates of one denoiser, by diffusers' module names. `root` is what diffusers calls the denoiser."""

    root: str  # unet or transformer
    updates: dict[str, Update]
    left_out: list[str] = field(default_factory=lambda: [])  # text-encoder modules, which no policy adapts


def parse(tensors: Mapping[str, Tensor], alpha_of: Callable[[str, int], float] = lambda name, rank: float(rank)) -> Adapter:
    """Tensors of a LoRA file in any known layout. `alpha_of` a module's name and rank, where no tensor says its alpha.

    Raises ValueError, without the file's name, for anything else: one clear line.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        suffix = next((s for s in _HALVES if key.endswith(s)), None)
        if suffix:
            halves.setdefault(key.removesuffix(suffix), {})[_HALVES[suffix]] = value
        elif key.endswith(".alpha"):
            scales[key.removesuffix(".alpha")] = float(value)
        else:
            strange.append(key)
    if not halves:
        raise ValueError(f"holds no LoRA{f': first key {strange[0]}' if strange else ''}")
    if strange:
        raise ValueError(f"holds more than plain LoRA (DoRA, LoHa, LoKr, biases?): {len(strange)} keys, first {strange[0]}")
    lone = sorted(stem for stem, pair in halves.items() if len(pair) < 2)
    if lone:
        raise ValueError(f"is incomplete: {lone[0]} has {'down' if 'down' in halves[lone[0]] else 'up'} without its other half")
    orphans = sorted(set(scales) - set(halves))
    if orphans:
        raise ValueError(f"is incomplete: {len(orphans)} modules have an alpha alone, first {orphans[0]}")
    text = sorted(stem for stem in halves if stem.startswith(_TEXT))
    updates: dict[str, Update] = {}
    for stem, pair in halves.items():
        if stem in text:
            continue
        down, up = pair["down"].float(), pair["up"].float()
        if up.ndim != down.ndim or up.shape[1] != down.shape[0]:
            raise ValueError(f"is incomplete: {stem} has halves of shapes {tuple(down.shape)} and {tuple(up.shape)}")
        name = plain_name(stem)
        alpha = scales[stem] if stem in scales else alpha_of(name, len(down))
        for part, rows in canonical(name, len(up), down.shape[1]).items():
            updates[part] = Update(down, up[rows], alpha)
    unet = any(name.startswith(("down_blocks", "up_blocks", "mid_block", "conv_in", "time_embedding")) for name in updates)
    return Adapter("unet" if unet else "transformer", updates, text)


def plain_name(stem: str) -> str:
    """A module's name without a layout's prefix and spelling."""
    for prefix in ("lora_unet_", "lora_transformer_"):
        if stem.startswith(prefix):
            return ".".join(_SPELLED.findall(stem.removeprefix(prefix)))
    for prefix in ("base_model.model.", "unet.", "transformer.", "diffusion_model."):
        stem = stem.removeprefix(prefix)
    stem = stem.replace(".processor.", ".")
    return stem + ".0" if stem.endswith(".to_out") else stem


def canonical(name: str, rows: int, columns: int = 0) -> dict[str, Rows]:
    """diffusers' names for a module of an original checkpoint, and which of its `rows` outputs each one is.

    A name that is diffusers' already stays. Original names are those of the LDM UNet with two residual blocks per level
    (all Stable Diffusion UNets), and of the published FLUX and SD3 transformers, whose attention projections are fused.
    """
    part = name.split(".")
    if part[0] in ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"):
        return {_from_ldm(part): slice(None)}
    if name in _STREAM_ENDS or part[0] in ("double_blocks", "single_blocks", "joint_blocks"):
        names = [_STREAM_ENDS[name]] if name in _STREAM_ENDS else _from_stream(part)
        if "adaLN_modulation" in name and rows == 2 * columns:
            return {names[0]: [*range(columns, rows), *range(columns)]}  # shift and scale there are scale and shift here
        width = rows // 7 if name.endswith(".linear1") else rows // len(names)  # linear1: q, k, v and a fourfold MLP
        edges = [i * width for i in range(len(names))] + [rows]
        return {n: slice(a, b) for n, a, b in zip(names, edges, edges[1:])}
    return {name: slice(None)}


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


def kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of a UNet's adapter in kohya's layout."""
    if adapter.root != "unet":
        raise ValueError("kohya's names for transformers are of fused projections: use --to diffusers, which ComfyUI loads too")
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": update.down, f"{stem}.lora_up.weight": update.up}
        tensors[f"{stem}.alpha"] = torch.tensor(update.alpha)
    return tensors


def diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors in diffusers' layout; the scale is inside B, because diffusers reads no alpha for SD3."""
    return {k: v for n, u in adapter.updates.items() for k, v in _halves(f"{adapter.root}.{n}", u.down, u.scaled_up()).items()}


def peft(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of a peft folder, whose configuration holds ranks and alphas."""
    return {k: v for n, u in adapter.updates.items() for k, v in _halves(f"base_model.model.{n}", u.down, u.up).items()}


def _halves(stem: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
