"""Prompts are encoded once, and read from the cache when a batch needs them."""

from __future__ import annotations

import pytest
import torch

from trainer.data.cache import TensorCache
from trainer.models import prompts as text
from trainer.models.load import load_policy


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_prompts_in_the_cache_need_no_text_encoder(family, family_folder, tmp_path, monkeypatch):
    prompts, cache = ["a red star", "a ring", ""], TensorCache(tmp_path / "cache")
    plain, first, second = (load_policy(family_folder(family), image_size=64) for _ in range(3))
    first.prompts.prepare(prompts, cache)
    monkeypatch.setattr(second.pipeline, "encode_prompt", None)
    second.prompts.prepare([*prompts, "a ring"], cache)
    expected, found = (policy.prompts.conditioning(prompts) for policy in (plain, second))
    assert expected.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
    assert len(list((tmp_path / "cache").iterdir())) == 3
    with pytest.raises(TypeError):
        second.prompts.conditioning(["unheard of"])


def test_of_the_prompts_in_a_cache_a_few_are_in_memory_and_a_lost_one_is_encoded_again(family_folder, tmp_path, monkeypatch):
    prompts = [f"a red star {i}" for i in range(6)]
    plain = load_policy(family_folder("sdxl")).prompts.conditioning(prompts)
    row = sum(value[0].nbytes for value in plain.values())
    monkeypatch.setattr(text, "EMBEDDINGS_KEPT", 2 * row)
    policy, folder = load_policy(family_folder("sdxl")), tmp_path / "cache"
    policy.prompts.prepare(prompts, TensorCache(folder))
    assert not policy.prompts._embeddings
    next(folder.glob("*.safetensors")).unlink()
    for order in (prompts, prompts[::-1]):
        for prompt in order:
            for name, value in policy.prompts.conditioning([prompt]).items():
                assert torch.equal(value[0], plain[name][prompts.index(prompt)])
            assert len(policy.prompts._embeddings) <= 2
    for name, value in policy.prompts.conditioning(prompts).items():  # more of them than are kept
        assert torch.equal(value, plain[name])


def test_prompts_are_encoded_again_where_anything_that_they_depend_on_changes(family_folder, tmp_path):
    folder, cache, seen = family_folder("sd3"), TensorCache(tmp_path / "cache"), []

    def encoded(change=lambda policy: None, dtype=torch.float32):
        policy = load_policy(folder, image_size=64, dtype=dtype)
        change(policy)
        encode = policy.encode_prompts
        policy.encode_prompts = lambda prompts: seen.extend(prompts) or encode(prompts)
        policy.prompts.prepare(["a red star", ""], cache)
        return [seen.pop() for _ in list(seen)]

    assert len(encoded()) == 2 and encoded() == []
    assert encoded(lambda p: setattr(p.pipeline.text_encoder_2.config, "_name_or_path", "moved")) == []
    assert len(encoded(dtype=torch.bfloat16)) == 2
    assert len(encoded(lambda p: p.pipeline.text_encoder_3.shared.weight.data.add_(1e-3))) == 2
    assert len(encoded(lambda p: setattr(p.pipeline.text_encoder.config, "hidden_act", "gelu_new"))) == 2
    assert len(encoded(lambda p: setattr(p.pipeline.tokenizer_3, "model_max_length", 8))) == 2
    assert len(encoded(lambda p: setattr(p, "max_tokens", 128))) == 2
    assert len(encoded(lambda p: p.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None))) == 2
    folder = family_folder("anima")
    assert len(encoded()) == 2 and encoded() == []
    assert len(encoded(lambda p: p.pipeline.text_conditioner.out_proj.bias.data.add_(1e-3))) == 2
    assert len(encoded(lambda p: setattr(p.pipeline.t5_tokenizer, "model_max_length", 8))) == 2
    damaged = sorted((tmp_path / "cache").iterdir())
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    assert len(encoded()) == 2
