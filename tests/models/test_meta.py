"""Policies without weights: real noise levels, true shapes, and nothing read."""

from __future__ import annotations

import pytest
import torch

from trainer.models.load import load_policy
from trainer.models.meta import meta_policy


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev", "krea2", "anima"])
def test_it_is_the_model_but_for_values(family, family_folder, monkeypatch):
    real = load_policy(family_folder(family), image_size=64)
    monkeypatch.setattr(torch, "load", None)
    policy = meta_policy(family_folder(family), image_size=64)
    assert type(policy) is type(real) and "sigmas" not in vars(policy)
    assert policy.latent_shape == real.latent_shape and policy.image_size == real.image_size
    for part in ("network", "vae"):
        ours, theirs = ({n: (p.shape, p.dtype) for n, p in getattr(p, part).named_parameters()} for p in (policy, real))
        assert ours == theirs and all(p.is_meta for p in getattr(policy, part).parameters())
    sigmas = policy.sigmas(8)
    assert sigmas.device.type == "cpu" and torch.equal(sigmas, real.sigmas(8))


def test_published_models_have_their_sizes():
    """Parameters of the networks as their cards state them: 0.86, 2.57 and 11.90 billion."""
    sizes = {name: sum(p.numel() for p in meta_policy(name).network.parameters()) for name in ("sd15", "sdxl", "flux-dev")}
    assert {name: round(size / 1e9, 2) for name, size in sizes.items()} == {"sd15": 0.86, "sdxl": 2.57, "flux-dev": 11.9}


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(FileNotFoundError, match="or one of sd15, sd21, sdxl"):
        meta_policy("sd16")
