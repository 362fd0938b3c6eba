"""A network's file in its original names, with a folder for the rest, is the folder it was made of."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from helpers.original_names import original_anima, original_krea
from safetensors.torch import save_file

from trainer.models import load
from trainer.models.anima import AnimaPolicy
from trainer.models.klein import KleinPolicy
from trainer.models.krea import KreaPolicy
from trainer.models.qwen import QwenPolicy
from trainer.models.zimage import ZImagePolicy

PROMPTS = ["a red star", "a blue ring, blurred"]


def original_zimage(state):
    """Z-Image's own names, in which attention projections are fused."""
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}
    names |= {
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    }
    found = {}
    for key, value in state.items():
        for here, there in names.items():
            key = key.replace(here, there)
        found[key] = value
    for key in [key for key in found if ".attention.to_q." in key]:
        found[key.replace("to_q", "qkv")] = torch.cat([found.pop(key.replace("to_q", f"to_{part}")) for part in "qkv"])
    return found


def original_klein(state):
    """FLUX.2's own names: fused projections, and the last modulation as shift and scale."""
    inside = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
    }
    inside |= {"ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2"}
    inside |= {"attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm"}
    inside |= {"attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm"}
    single = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
    ends = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    ends |= {f"time_guidance_embed.timestep_embedder.linear_{i}": f"time_in.{side}_layer" for i, side in ((1, "in"), (2, "out"))}
    ends |= {
        f"{m}.linear": f"{m}.lin" for m in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    }
    found = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        kind = "scale" if ".norm_" in module else kind
        block, number, rest = [*module.split(".", 2), "", ""][:3]
        if module == "norm_out.linear":
            found["final_layer.adaLN_modulation.1.weight"] = torch.cat([*reversed(value.chunk(2))])
        elif block == "transformer_blocks" and rest.startswith(("attn.to_", "attn.add_")) and rest not in inside:
            stream, first = ("img", "attn.to_q") if rest.startswith("attn.to_") else ("txt", "attn.add_q_proj")
            if rest == first:
                parts = [state[key.replace(first, first.replace("_q", f"_{part}"))] for part in "qkv"]
                found[f"double_blocks.{number}.{stream}_attn.qkv.weight"] = torch.cat(parts)
        elif block == "transformer_blocks":
            found[f"double_blocks.{number}.{inside[rest]}.{kind}"] = value
        elif block == "single_transformer_blocks":
            found[f"single_blocks.{number}.{single[rest]}.{kind}"] = value
        else:
            found[f"{ends[module]}.{kind}"] = value
    return found


def prediction(policy):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS, guidance_scale=2.0)(x, torch.tensor([0.8, 0.4]))


CASES = {
    "z-image": (ZImagePolicy, original_zimage),
    "klein": (KleinPolicy, original_klein),
    "krea2": (KreaPolicy, original_krea),
    "qwen-image": (QwenPolicy, dict),
    "anima": (AnimaPolicy, original_anima),
}


@pytest.fixture(params=CASES)
def case(request, family_folder, tmp_path, monkeypatch):
    """A family's folder, its policy, and the tensors of its network's file; the family counts the tiny model as published."""
    family, original = CASES[request.param]
    folder = family_folder(request.param)
    policy = family.load(folder, image_size=64)
    name, config = next(iter(family.published.items()))
    in_file = [family.network_name, *family.within]
    tiny = {key: dict(getattr(policy.pipeline, key).config) for key in in_file}
    parts = {key: (kind, tiny.get(key, settings)) for key, (kind, settings) in config.parts.items()}
    monkeypatch.setattr(load, "detect", lambda shapes: name)
    monkeypatch.setitem(load.MODELS, name, (family, replace(config, parts=parts)))
    states = [getattr(policy.pipeline, key).state_dict() for key in in_file]
    return folder, policy, {key: value.contiguous() for key, value in original(*states).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
def test_a_file_is_the_folder_it_was_made_of(case, prefix, tmp_path):
    folder, policy, tensors = case
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "network.safetensors")
    again = load.load_policy(tmp_path / "network.safetensors", parts=folder, image_size=64)
    for name in (policy.network_name, *policy.within):
        before, after = (getattr(p.pipeline, name).state_dict() for p in (policy, again))
        assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(prediction(policy), prediction(again), rtol=1e-5, atol=1e-6)  # weights may be aligned otherwise
    assert torch.equal(policy.sigmas(7), again.sigmas(7))


def test_scales_of_norms_may_be_called_weights(case, tmp_path):
    """As ComfyUI 0.33 saves FLUX's, FLUX.2's and Chroma's."""
    folder, policy, tensors = case
    named = {re.sub(r"(query_norm|key_norm)\.scale$", r"\1.weight", key): value for key, value in tensors.items()}
    if set(named) == set(tensors):
        pytest.skip("no such norms")
    save_file(named, tmp_path / "network.safetensors")
    again = load.load_policy(tmp_path / "network.safetensors", parts=folder, image_size=64).network.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in policy.network.state_dict().items())


def test_what_is_missing_is_named(case, tmp_path):
    folder, _, tensors = case
    file = tmp_path / "network.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        FileNotFoundError, match=r"needs its vae, in ComfyUI models/vae/\w.*: name it \(vae = FILE\), or a diffusers folder"
    ):
        load.load_policy(file)
    gone = next(key for key in tensors if key.endswith(("qkv.weight", "wq.weight", "add_q_proj.weight", "cross_attn.q_proj.weight")))
    save_file({key: value for key, value in tensors.items() if key != gone}, file)
    with pytest.raises(ValueError, match=rf"is not the published .*: {3 if 'qkv' in gone else 1} of its weights differ"):
        load.load_policy(file, parts=folder)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"1 of its weights differ, extra.weight"):
        load.load_policy(file, parts=folder)
