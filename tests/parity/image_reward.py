"""ImageReward over transformers' BLIP vision and text models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.pixels import pixel_batch
from tests.parity.weights import apply_head, random_head, randomise
from trainer.rewards.image_reward import TOKENS

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz",
    *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ",",
    "fox",
    "red",
]


def blip(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """The vision and the text model, random."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    image, text = architecture["image"], architecture["text"]
    vision: Any = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=image["width"],
            intermediate_size=4 * image["width"],
            num_hidden_layers=image["depth"],
            num_attention_heads=image["heads"],
            image_size=image["size"],
            patch_size=image["patch"],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
    )
    words: Any = BlipTextModel(
        BlipTextConfig(
            vocab_size=text["vocabulary"],
            hidden_size=text["width"],
            encoder_hidden_size=image["width"],
            intermediate_size=text["wide"],
            num_hidden_layers=text["depth"],
            num_attention_heads=text["heads"],
            max_position_embeddings=512,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    )
    return randomise(vision, 6), randomise(words, 7)


def write_image_reward(folder: Path, architecture: Mapping[str, Any]) -> Any:
    """Write the files of ImageReward; returns the independent scorer."""
    from transformers import BertTokenizer

    image, text = architecture["image"], architecture["text"]
    vision, words = blip(architecture)
    head = random_head(text["width"], 8)
    e = vision.embeddings
    tower = {
        "cls_token": e.class_embedding,
        "pos_embed": e.position_embedding,
        "patch_embed.proj.weight": e.patch_embedding.weight,
        "patch_embed.proj.bias": e.patch_embedding.bias,
        "norm.weight": vision.post_layernorm.weight,
        "norm.bias": vision.post_layernorm.bias,
    }
    for i, block in enumerate(vision.encoder.layers):
        parts = {"norm1": block.layer_norm1, "norm2": block.layer_norm2, "attn.qkv": block.self_attn.qkv}
        parts |= {"attn.proj": block.self_attn.projection, "mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2}
        for name, module in parts.items():
            tower |= {f"blocks.{i}.{name}.weight": module.weight, f"blocks.{i}.{name}.bias": module.bias}
    state = {f"blip.visual_encoder.{k}": x.detach().clone() for k, x in tower.items()}
    state |= {f"blip.text_encoder.{k}": x.clone() for k, x in words.state_dict().items()}
    state |= {f"mlp.{k}": x for k, x in head.items()}
    state |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "blip.vision_proj.weight": torch.zeros(256, image["width"]),
    }
    torch.save(state, folder / "ImageReward.pt")
    vocabulary = [*WORDS, *(f"[unused{i}]" for i in range(text["vocabulary"] - len(WORDS)))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    reader: Any = BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, do_lower_case=True)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        seen = vision(pixel_values=pixel_batch(images, image["size"])).last_hidden_state
        read = reader(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        hidden = words(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        return apply_head(head, hidden[:, 0])

    return score
