"""MPS over transformers' CLIPModel, its cross model written out head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.parity.clip import transformers_clip
from tests.parity.pixels import pixels
from trainer.rewards.clip import tokenizer
from trainer.rewards.mps import CONDITION


def write_mps(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size, dim = transformers_clip(architecture, 9), architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
    rng = torch.Generator().manual_seed(10)
    state = {f"mps.model.{k}": x.clone().contiguous() for k, x in model.state_dict().items()}
    shapes = {"to_q": (dim, dim), "to_kv": (128, dim), "to_out": (dim, dim), "ff.0": (8 * dim, dim), "ff.2": (dim, 4 * dim)}
    fused = {"fused_attn_ff_proj": (9 * dim + 128, dim), "attn_out": (dim, dim), "ff_out.1": (dim, 4 * dim)}
    for layer in range(4):
        for part, table in ((0, shapes), (1, fused)):
            at = f"mps.cross_model.layers.{layer}.{part}.fn."
            for name, shape in table.items():
                state[f"{at}{name}.weight"] = torch.randn(shape, generator=rng) / shape[1] ** 0.5
            state[at + "norm.weight"], state[at + "norm.bias"] = 1 + 0.1 * torch.randn(dim, generator=rng), torch.zeros(dim)
        state[f"mps.cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    save_file(state, folder / "model.safetensors")
    weights = {k.removeprefix("mps.cross_model.layers."): x for k, x in state.items() if "cross_model" in k}

    def score(images: Sequence[Tensor], prompts: Sequence[str], threshold: float = 0.3) -> Tensor:
        return torch.stack([_mps_of_one(model, weights, pixels(i, size, False), p, threshold) for i, p in zip(images, prompts)])

    return score


def _mps_of_one(model: Any, weights: Mapping[str, Tensor], pixels: Tensor, prompt: str, threshold: float) -> Tensor:
    """One image, one prompt, head by head, as the paper's text and the released code describe it."""
    end = 49407

    def read(text: str) -> tuple[Tensor, int]:
        ids = tokenizer()([text])[0]
        stop = ids.tolist().index(end)
        ids[stop:] = end
        return model.text_projection(model.text_model(input_ids=ids[None]).last_hidden_state)[0], stop

    words, stop = read(prompt)
    condition, _ = read(CONDITION)
    affinity = torch.tensor([max(float(w @ c) for c in condition) for w in words])
    kept = [i for i in range(len(words)) if float(affinity[i] / affinity.max()) > threshold]
    x = model.visual_projection(model.vision_model(pixel_values=pixels[None]).last_hidden_state)[0]
    dim = x.shape[1]

    def norm(tokens: Tensor, scale: Tensor) -> Tensor:
        centred = tokens - tokens.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale

    def gated(tokens: Tensor) -> Tensor:
        first, second = tokens[:, : tokens.shape[1] // 2], tokens[:, tokens.shape[1] // 2 :]
        return second * torch.sigmoid(second) * first

    def turned(tokens: Tensor) -> Tensor:
        pairs = torch.complex(tokens[:, :32], tokens[:, 32:])  # a half-rotation pairs dimension i with i + 32
        angles = torch.arange(len(tokens))[:, None] / 10000 ** (torch.arange(32) / 32)
        spun = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([spun.real, spun.imag], 1)

    def heads(q: Tensor, k: Tensor, v: Tensor, turn: bool) -> Tensor:
        outs: list[Tensor] = []
        for h in range(dim // 64):
            asked = q[:, 64 * h : 64 * h + 64]
            asked, answered = (turned(asked), turned(k)) if turn else (asked, k)
            outs.append(torch.softmax(asked @ answered.T / 8, 1) @ v)
        return torch.cat(outs, 1)

    for layer in range(4):
        w = {k.removeprefix(f"{layer}.0.fn."): t for k, t in weights.items() if k.startswith(f"{layer}.0.")}
        y, kv = norm(x, w["norm.weight"]), words[kept] @ w["to_kv.weight"].T
        seen = heads(y @ w["to_q.weight"].T, kv[:, :64], kv[:, 64:], False)
        x = x + seen @ w["to_out.weight"].T + gated(y @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.removeprefix(f"{layer}.1.fn."): t for k, t in weights.items() if k.startswith(f"{layer}.1.")}
        q, k, v, ff = (norm(x, w["norm.weight"]) @ w["fused_attn_ff_proj.weight"].T).split([dim, 64, 64, 8 * dim], 1)
        x = x + heads(q, k, v, True) @ w["attn_out.weight"].T + gated(ff) @ w["ff_out.1.weight"].T
    return model.logit_scale.exp() * F.cosine_similarity(words[stop], x[0], dim=0)
