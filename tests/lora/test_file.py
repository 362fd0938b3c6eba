"""LoRA files: what is written loads in full, here, in diffusers and in ComfyUI's naming; foreign files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from trainer.lora import names
from trainer.lora.file import load_lora, read_lora, save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora


def tuned(policy, rank=4, alpha=8.0):
    policy.add_lora(Lora(rank=rank, alpha=alpha))
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=rng))
    return policy


def denoised(policy):
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        return policy.denoiser(["a red star"])(x, sigma)


def test_a_saved_lora_loads_back_to_the_same_model(policy, pipeline_folder, tmp_path):
    tuned(policy)
    save_lora(policy, tmp_path / "a.safetensors", {"switch_sigma": 0.6})
    other = UNetPolicy.load(pipeline_folder)
    assert load_lora(other, tmp_path / "a.safetensors") == {"switch_sigma": 0.6}
    assert torch.equal(denoised(policy), denoised(other))
    assert not list(tmp_path.glob("*.partial"))


def test_strength_scales_the_whole_update(policy, pipeline_folder, tmp_path):
    """Half strength equals half alpha, and none the base."""
    tuned(policy)
    save_lora(policy, tmp_path / "a.safetensors", {})
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({k: v / 2 if k.endswith(".alpha") else v for k, v in tensors.items()}, tmp_path / "half.safetensors")
    policies = [UNetPolicy.load(pipeline_folder) for _ in range(4)]
    load_lora(policies[0], tmp_path / "a.safetensors", 0.5)
    load_lora(policies[1], tmp_path / "half.safetensors")
    load_lora(policies[2], tmp_path / "a.safetensors", 0.0)
    torch.testing.assert_close(denoised(policies[0]), denoised(policies[1]))
    torch.testing.assert_close(denoised(policies[2]), denoised(policies[3]))


def test_diffusers_loads_every_key_and_predicts_the_same(policy, pipeline_folder, tmp_path):
    tuned(policy)
    save_lora(policy, tmp_path / "a.safetensors", {})
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs = UNetPolicy(pipeline)
    torch.testing.assert_close(denoised(theirs), denoised(policy), rtol=1e-5, atol=1e-5)


def test_names_are_kohya_and_alpha_is_explicit(policy, tmp_path):
    tuned(policy)
    save_lora(policy, tmp_path / "a.safetensors", {})
    tensors = load_file(tmp_path / "a.safetensors")
    downs = [k for k in tensors if k.endswith(".lora_down.weight")]
    assert downs and all(k.startswith("lora_unet_") for k in tensors)
    for key in downs:
        stem = key.removesuffix(".lora_down.weight")
        assert float(tensors[f"{stem}.alpha"]) == 8.0 and tensors[key].shape[0] == 4
        assert f"{stem}.lora_up.weight" in tensors
    assert len(tensors) == 3 * len(downs)


def test_metadata_survives(policy, tmp_path):
    tuned(policy)
    save_lora(policy, tmp_path / "a.safetensors", {"settings": {"lr": 1e-3}})
    _, ours, header = read_lora(tmp_path / "a.safetensors")
    assert ours == {"settings": {"lr": 1e-3}} and header["ss_network_dim"] == "4" and json.loads(header["imagerefl"]) == ours


def test_a_lora_for_another_model_is_refused(policy, tmp_path):
    save_file(
        {"lora_unet_mid_block_other.lora_down.weight": torch.zeros(4, 8), "lora_unet_mid_block_other.lora_up.weight": torch.zeros(8, 4)},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ValueError, match="made for another model: 1 of 1 modules unknown"):
        load_lora(policy, tmp_path / "b.safetensors")


def test_wrong_shapes_truncated_and_missing_files_are_refused(policy, pipeline_folder, tmp_path):
    tuned(policy)
    path = tmp_path / "a.safetensors"
    save_lora(policy, path, {})
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    save_file({**tensors, key: torch.zeros(3, 4)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="has shape"):
        load_lora(UNetPolicy.load(pipeline_folder), tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        read_lora(path)
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        read_lora(tmp_path / "none.safetensors")


def test_a_file_whose_keys_do_not_read_back_as_the_modules_is_not_kept(policy, tmp_path, monkeypatch):
    tuned(policy)
    monkeypatch.setattr(names, "stem", lambda module, layout, root: "lora_unet_" + module.replace(".", "_").replace("to_q", "to_z"))
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: \d+ modules of the written file do not match the adapter, first "):
        save_lora(policy, tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())
