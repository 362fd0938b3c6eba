"""HPS, PickScore, CLIP score, ICT, HP and the aesthetic predictor over transformers' CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.parity.pixels import pixel_batch
from tests.parity.weights import apply_head, random_head, randomise
from trainer.rewards.clip import tokenizer


def transformers_clip(architecture: Mapping[str, Any], seed: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    vision, text, act = architecture["vision_cfg"], architecture["text_cfg"], "quick_gelu" if architecture["quick_gelu"] else "gelu"
    config = CLIPConfig(
        projection_dim=architecture["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": act,
            "projection_dim": architecture["embed_dim"],
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "hidden_act": act,
            "eos_token_id": 49407,
            "projection_dim": architecture["embed_dim"],
        },
    )
    return randomise(CLIPModel(config), seed)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def text_features(model: Any, prompts: Sequence[str]) -> Tensor:
    return F.normalize(model.text_projection(model.text_model(input_ids=tokenizer()(prompts)).pooler_output), dim=-1)


def as_open_clip(model: Any) -> dict[str, Tensor]:
    """transformers' CLIPModel in open_clip's layout, tensor by tensor, written apart from the port's own renaming."""
    state: dict[str, Tensor] = {"logit_scale": model.logit_scale}
    v, t = model.vision_model, model.text_model
    state["visual.class_embedding"] = v.embeddings.class_embedding
    state["visual.conv1.weight"] = v.embeddings.patch_embedding.weight
    state["visual.positional_embedding"] = v.embeddings.position_embedding.weight
    state["visual.proj"], state["text_projection"] = model.visual_projection.weight.T, model.text_projection.weight.T
    state["token_embedding.weight"] = t.embeddings.token_embedding.weight
    state["positional_embedding"] = t.embeddings.position_embedding.weight
    norms = {"visual.ln_pre": v.pre_layrnorm, "visual.ln_post": v.post_layernorm, "ln_final": t.final_layer_norm}
    linears: dict[str, Any] = {}
    for prefix, encoder in (("visual.transformer", v.encoder), ("transformer", t.encoder)):
        for i, block in enumerate(encoder.layers):
            at = f"{prefix}.resblocks.{i}."
            norms |= {at + "ln_1": block.layer_norm1, at + "ln_2": block.layer_norm2}
            linears |= {at + "attn.out_proj": block.self_attn.out_proj, at + "mlp.c_fc": block.mlp.fc1, at + "mlp.c_proj": block.mlp.fc2}
            qkv = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            state[at + "attn.in_proj_weight"] = torch.cat([part.weight for part in qkv])
            state[at + "attn.in_proj_bias"] = torch.cat([part.bias for part in qkv])
    for name, module in (norms | linears).items():
        state[name + ".weight"], state[name + ".bias"] = module.weight, module.bias
    return {k: x.detach().clone().contiguous() for k, x in state.items()}


def write_hps(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 1), architecture["vision_cfg"]["image_size"]
    torch.save({"state_dict": as_open_clip(model)}, folder / "HPS_v2.1_compressed.pt")
    return lambda images, prompts: (image_features(model, pixel_batch(images, size, pad=True)) * text_features(model, prompts)).sum(-1)


def write_pickscore(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 2), architecture["vision_cfg"]["image_size"]
    save_file({k: x.clone().contiguous() for k, x in model.state_dict().items()}, folder / "model.safetensors")
    return lambda images, prompts: (
        model.logit_scale.exp() * (image_features(model, pixel_batch(images, size)) * text_features(model, prompts)).sum(-1)
    )


def write_clip(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 3), architecture["vision_cfg"]["image_size"]
    save_file(as_open_clip(model), folder / "open_clip_model.safetensors")
    return lambda images, prompts: (image_features(model, pixel_batch(images, size)) * text_features(model, prompts)).sum(-1)


def write_aesthetic(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 4), architecture["vision_cfg"]["image_size"]
    head = random_head(architecture["embed_dim"], 5)
    save_file(as_open_clip(model), folder / "open_clip_model.safetensors")
    torch.save(head, folder / "aesthetic-model.pth")
    return lambda images, prompts: apply_head(head, image_features(model, pixel_batch(images, size)))


def write_ict(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 6), architecture["vision_cfg"]["image_size"]
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return lambda images, prompts: (image_features(model, pixel_batch(images, size)) * text_features(model, prompts)).sum(-1)


def write_hp(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = transformers_clip(architecture, 7), architecture["vision_cfg"]["image_size"]
    head = random_head(architecture["embed_dim"], 8)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(head, folder / "mlp_pytorch_model.bin")

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        features = model.visual_projection(model.vision_model(pixel_values=pixel_batch(images, size)).pooler_output)
        return 1 / (1 + torch.exp(-apply_head(head, features)))

    return score
