"""LoRAs of a sister model: base and turbo share theirs, and one of another size names the model that it is for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from trainer.lora.file import load_lora
from trainer.models.meta import denoiser_modules, meta_policy


def lora(path, model, modules):
    """A LoRA of rank 1 with the shapes of a published model."""
    shapes = {name: shape for name, shape in denoiser_modules(model).items() if name.endswith(modules)}
    tensors = {f"transformer.{name}.lora_A.weight": torch.zeros(1, shape[1]) for name, shape in shapes.items()}
    save_file({**tensors, **{f"transformer.{name}.lora_B.weight": torch.ones(shape[0], 1) for name, shape in shapes.items()}}, path)
    return path


def test_a_sister_of_another_size_is_named(tmp_path):
    modules = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_qkv_mlp_proj")
    small = lora(tmp_path / "4b.safetensors", "flux2-klein-4b", modules)
    large = lora(tmp_path / "9b.safetensors", "flux2-klein-9b", (*modules, "transformer_blocks.7.attn.to_q"))
    with pytest.raises(
        ValueError, match=r"4b.safetensors was made for another model: .* \(27648, 3072\), .* \(36864, 4096\); it is for flux2-klein-4b$"
    ):
        load_lora(meta_policy("flux2-klein-9b"), small)
    with pytest.raises(
        ValueError, match=r"9b.safetensors was made for another model: 1 of \d+ modules unknown, .*; it is for flux2-klein-9b$"
    ):
        load_lora(meta_policy("flux2-klein-4b"), large)
    with pytest.raises(ValueError, match=r"9b.safetensors was made for another model: .*; it is for flux2-klein-9b$"):
        load_lora(meta_policy("z-image"), large)


def test_base_and_turbo_take_each_others(tmp_path):
    for name in ("z-image", "krea2"):
        file = lora(tmp_path / f"{name}.safetensors", name, (".to_q", ".to_k"))
        policy = meta_policy(f"{name}-turbo")
        load_lora(policy, file)
        assert policy.lora is not None and len(policy.named_parameters()) == 2 * len(
            policy.adapters.adaptable().keys() & set(policy.lora.targets)
        )
