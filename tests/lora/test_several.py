"""A list of LoRAs with strengths is diffusers' `set_adapters` with those weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.lora.file import save_lora
from trainer.lora.several import load_loras, parse_strength
from trainer.models.unet import UNetPolicy
from trainer.models.zimage import ZImagePolicy
from trainer.policy import Lora

PROMPTS = ["a red star", "a blue ring"]


def random_lora(policy, path, seed, lora):
    policy.add_lora(lora)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    save_lora(policy, path, {})
    return path


def predicted(policy, adapter="tuned"):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS, adapter=adapter)(x, torch.tensor([0.9, 0.3]))


@pytest.mark.parametrize(("family", "kind"), [("sd15", UNetPolicy), ("z-image", ZImagePolicy)])
def test_a_list_equals_diffusers_set_adapters(family, kind, family_folder, tmp_path):
    """Two ranks, two alphas and one module that only one of them adapts."""
    one, other = Lora(rank=4, alpha=6.0), Lora(rank=3, alpha=1.5, targets=("to_q", "to_k") if family == "sd15" else ("attention.to_q",))

    def loaded():
        return kind.load(family_folder(family), image_size=64)

    files = [(random_lora(loaded(), tmp_path / f"{i}.safetensors", i, lora), s) for i, (lora, s) in enumerate([(one, 0.8), (other, -0.5)])]
    theirs, ours = loaded(), loaded()
    base = predicted(theirs, "base")
    for i, (path, _) in enumerate(files):
        theirs.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"part{i}")
    theirs.pipeline.set_adapters([f"part{i}" for i in range(2)], [s for _, s in files])
    expected = predicted(theirs)
    load_loras(ours, files, "below")
    load_loras(ours, files[:1])
    effect = float((expected - base).abs().max())
    assert effect > 1e-2 and float((predicted(ours, "below") - expected).abs().max()) < 1e-4 * effect
    assert torch.equal(predicted(ours, "base"), base) and not torch.allclose(predicted(ours), expected)


def test_a_strength_follows_the_last_colon_of_a_path_that_does_not_exist(tmp_path):
    assert parse_strength("a.safetensors:0.8") == (Path("a.safetensors"), 0.8)
    assert parse_strength("a.safetensors", 0.5) == (Path("a.safetensors"), 0.5)
    assert parse_strength("C:\\loras\\a.safetensors") == (Path("C:\\loras\\a.safetensors"), 1.0)
    (tmp_path / "v:2").touch()
    assert parse_strength(f"{tmp_path}/v:2") == (tmp_path / "v:2", 1.0)
    assert parse_strength(f"{tmp_path}/v:2:-1") == (tmp_path / "v:2", -1.0)
    with pytest.raises(ValueError, match="give a finite strength, as in a:0.8"):
        parse_strength("a:inf")
