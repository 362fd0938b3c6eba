"""Switching adapters: what it costs, what it leaves as it was, and which adapter a recomputed forward runs with."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.models.load import load_policy
from trainer.models.meta import meta_policy
from trainer.policy import ATTENTION, Lora

PROMPTS = ("a red star", "two blue rings")


@pytest.fixture
def adapted(family_folder):
    """A function from a family's name to a policy with the adapters `tuned` and `consistency`, both far from the identity."""

    def make(family="sd15", full=False):
        policy = load_policy(family_folder(family), image_size=64)
        policy.adapters.attach("consistency", Lora(rank=3, alpha=3.0))
        policy.tune_weights() if full else policy.add_lora(Lora(rank=2, alpha=4.0))
        rng = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name in ("tuned", "consistency"):
                for p in policy.adapters.parameters(name).values():
                    p.add_((0.02 if full else 0.2) * torch.randn(p.shape, generator=rng))
        return policy

    return make


def state(policy, seed=0):
    return torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(seed)), torch.tensor([0.8, 0.4])


def test_a_switch_walks_no_network_and_changes_no_flag(adapted, monkeypatch):
    policy, walks = adapted("sdxl"), []
    flags = {name: p.requires_grad for name, p in policy.network.named_parameters()}
    denoisers = {name: policy.denoiser(PROMPTS, adapter=name) for name in ("tuned", "base", "consistency")}
    for walk in ("modules", "named_modules", "parameters", "named_parameters"):
        whole = getattr(nn.Module, walk)
        monkeypatch.setattr(nn.Module, walk, lambda self, *a, w=whole, **k: walks.append(w.__name__) or w(self, *a, **k))
    counts = {}
    for name, denoiser in denoisers.items():
        walks.clear()
        with torch.no_grad():
            denoiser(*state(policy))
        counts[name] = len(walks)
    assert counts["base"] == counts["consistency"] == counts["tuned"], counts  # what the network itself does
    walks.clear()
    with pytest.raises(KeyboardInterrupt), policy.adapters.using("base"):
        raise KeyboardInterrupt
    assert not walks and policy.adapters.active == "tuned"
    monkeypatch.undo()
    assert flags == {name: p.requires_grad for name, p in policy.network.named_parameters()}


@pytest.mark.slow
def test_a_switch_of_sdxl_computes_nothing_and_calls_little():
    """No tensor operation, and a bounded number of Python calls for each adapted layer, there and back."""
    policy = meta_policy("sdxl")
    policy.add_lora(Lora())
    layers = sum(".lora_A." in name for name, _ in policy.network.named_parameters())
    calls, operations = [], []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **(kwargs or {}))

    with Operations():
        sys.setprofile(lambda frame, event, _: calls.append(event) if event == "call" else None)
        try:
            with policy.adapters.using("base"):
                pass
        finally:
            sys.setprofile(None)
    assert layers > 500 and not operations and len(calls) < 10 * layers, (layers, len(calls), operations[:3])


def chained(policy, frozen):
    """The gradient to x and to the parameters of a loss whose graph holds both adapters, each evaluated twice, in turn."""
    x, sigma = state(policy)
    x.requires_grad_()
    tuned, other = policy.denoiser(PROMPTS, guidance_scale=2.0), policy.denoiser(PROMPTS, adapter=frozen)
    middle = tuned(x, sigma)
    end = tuned(other(middle, sigma), sigma / 2)
    (end.square().sum() + (other(end, sigma / 2) - middle).square().sum()).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    for p in policy.parameters():
        p.grad = None
    return {"x": x.grad, **gradients}


@pytest.mark.parametrize(("family", "full"), [("sd15", False), ("sdxl", False), ("sd3", False), ("flux-dev", False), ("sd15", True)])
@pytest.mark.parametrize("frozen", ["base", "consistency"])
def test_a_recomputed_forward_runs_with_the_adapter_of_its_first(family, full, frozen, adapted):
    policy = adapted(family, full)
    plain = chained(policy, frozen)
    policy.gradient_checkpointing(denoiser=True, vae=False)
    again = chained(policy, frozen)
    assert plain.keys() == again.keys() and float(plain["x"].norm()) > 0
    unused = [name for name, value in plain.items() if value is None]  # text projections of SD3's last block
    assert len(unused) < len(plain) / 10
    largest = max(float(value.abs().max()) for value in plain.values() if value is not None)
    for name, value in plain.items():
        if value is not None:
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-4 * largest, msg=lambda m, name=name: f"{name}: {m}")
    assert policy.adapters.active == "tuned"


def test_a_recomputed_forward_keeps_its_adapter_where_another_is_active(adapted):
    policy, gradients = adapted(), []
    x, sigma = state(policy)
    for recomputed in (False, True):
        policy.gradient_checkpointing(denoiser=recomputed, vae=False)
        loss = policy.denoiser(PROMPTS)(x, sigma).square().sum()
        with policy.adapters.using("consistency"):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        for p in policy.parameters():
            p.grad = None
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.parametrize(("family", "count"), [("sd15", 4), ("sd3", 8), ("flux-dev", 8)])
def test_targets_are_the_familys_attention_unless_they_are_given(family, count, family_folder):
    """0.1.0 took the four names of a UNet for no choice at all, and adapted eight projections instead."""
    default, explicit = (load_policy(family_folder(family), image_size=64) for _ in range(2))
    default.add_lora(Lora(rank=1, alpha=1.0))
    explicit.add_lora(Lora(rank=1, alpha=1.0, targets=ATTENTION))
    kinds = [{name.split(".lora_")[0].split("attn")[-1] for name, _ in p.named_parameters()} for p in (default, explicit)]
    ends = [{end.lstrip("12.") for end in found} for found in kinds]
    assert len(ends[0]) == count and ends[1] == set(ATTENTION)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_rows_share_the_conditioning_and_are_the_denoiser_of_those_prompts(guidance_scale, adapted, monkeypatch):
    policy = adapted("sdxl")
    x, sigma = state(policy)
    whole = policy.denoiser(PROMPTS, guidance_scale=guidance_scale)
    alone = policy.denoiser(PROMPTS[1:], guidance_scale=guidance_scale)
    monkeypatch.setattr(policy.prompts, "conditioning", None)
    index = torch.tensor([1])
    with torch.no_grad():
        assert torch.equal(whole.rows(index)(x[1:], sigma[1:]), alone(x[1:], sigma[1:]))
        assert torch.equal(
            whole.rows(torch.tensor([1, 0])).rows(torch.tensor([1]))(x[:1], sigma[:1]), whole.rows(index - 1)(x[:1], sigma[:1])
        )
