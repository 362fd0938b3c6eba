"""The trained adapter beside a consistency adapter: each is what a separate load gives, and switching restores what is trained."""

from __future__ import annotations

import pytest
import torch
from helpers.unet import adapted

from trainer.lora.file import load_consistency, load_lora
from trainer.models.unet import UNetPolicy


def test_states_are_the_models_that_separate_loads_give(pipeline_folder, consistency_lora):
    policy = adapted(pipeline_folder, consistency_lora)
    x, sigma, prompts = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.7, 4.0]),
        ["a red star", "a ring"],
    )
    alone = UNetPolicy.load(pipeline_folder)
    with torch.no_grad():
        tuned = policy.denoiser(prompts)(x, sigma)
        torch.testing.assert_close(tuned, adapted(pipeline_folder, None).denoiser(prompts)(x, sigma))
        torch.testing.assert_close(policy.denoiser(prompts, adapter="base")(x, sigma), alone.denoiser(prompts)(x, sigma))
        load_lora(alone, consistency_lora)
        estimated = policy.denoiser(prompts, adapter="consistency")(x, sigma)
        torch.testing.assert_close(estimated, alone.denoiser(prompts)(x, sigma))
        assert (estimated - tuned).abs().max() > 1e-3
        torch.testing.assert_close(policy.denoiser(prompts)(x, sigma), tuned)
    with pytest.raises(ValueError, match="no adapter 'consistency' is loaded: use one of base, tuned"):
        alone.denoiser(prompts, adapter="consistency")


def test_every_toggle_restores_what_is_trained(pipeline_folder, consistency_lora):
    policy = adapted(pipeline_folder, consistency_lora)
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    for state in ("base", "consistency"):
        leaf = x.clone().requires_grad_()
        policy.denoiser(["a"], adapter=state)(leaf, sigma).sum().backward()
        assert float(leaf.grad.abs().max()) > 0 and not any(p.grad is not None for p in policy.network.parameters())
        trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in policy.named_parameters()}
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        before = [p.detach().clone() for p in policy.parameters()]
        frozen = {name: p.detach().clone() for name, p in policy.network.named_parameters() if name not in trained}
        policy.denoiser(["a"])(x, sigma).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
        assert all(torch.equal(value, dict(policy.network.named_parameters())[name]) for name, value in frozen.items())


def test_a_consistency_adapter_of_another_model_is_refused(pipeline_folder, consistency_lora, tmp_path):
    from safetensors.torch import load_file, save_file

    renamed = {k.replace("down_blocks_0", "down_blocks_7"): v for k, v in load_file(consistency_lora).items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made for another model"):
        load_consistency(UNetPolicy.load(pipeline_folder), tmp_path / "other.safetensors")
