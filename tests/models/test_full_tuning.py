"""Every weight tuned: what is trained, what stays the base, and the file of differences that every loader takes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.losses import loss_of
from helpers.unet import OBJECTIVE, PROMPTS, brightness, image_batch
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.config import ConfigError, build
from trainer.lora.extract import weight_files
from trainer.lora.file import load_lora, read_lora, save_delta
from trainer.models.open import denoiser_hashes
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.runtime.files import file_hash, files_hash
from trainer.training.config import TrainConfig
from trainer.training.parts import Parts
from trainer.training.run import Run


def moved(policy, scale=0.02):
    """The policy with every weight a little elsewhere."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng))
    return policy


def outputs(denoiser):
    x, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 0.5])
    with torch.no_grad():
        return denoiser(x, sigma)


@pytest.fixture
def whole(policy):
    policy.tune_weights()
    return policy


def test_all_weights_are_trained_and_the_base_is_what_was_loaded(whole, pipeline_folder):
    fresh = UNetPolicy.load(pipeline_folder)
    names = dict(fresh.network.named_parameters())
    assert dict(whole.named_parameters()).keys() == names.keys()
    before = outputs(fresh.denoiser(PROMPTS))
    assert torch.equal(outputs(whole.denoiser(PROMPTS)), before)
    moved(whole)
    assert not torch.allclose(outputs(whole.denoiser(PROMPTS)), before)
    assert torch.equal(outputs(whole.denoiser(PROMPTS, adapter="base")), before)
    with pytest.raises(RuntimeError, match="an error inside"), whole.adapters.using("base"):
        raise RuntimeError("an error inside")
    assert all(p is whole.network.get_parameter(name) for name, p in whole.named_parameters())


def test_inside_the_base_gradients_reach_the_input_and_no_weight(whole, pipeline_folder):
    x, sigma, fresh = torch.randn(2, 4, 8, 8), torch.tensor([2.0, 0.5]), UNetPolicy.load(pipeline_folder)
    pulls = []
    for policy in (moved(whole), fresh):
        leaf = x.clone().requires_grad_()
        policy.denoiser(PROMPTS, adapter="base")(leaf, sigma).square().sum().backward()
        pulls.append(leaf.grad)
    assert torch.equal(*pulls) and all(p.grad is None for p in whole.parameters())


def gradients(policy, on):
    policy.gradient_checkpointing(denoiser=on, vae=False)
    for p in policy.parameters():
        p.grad = None
    loss_of(OBJECTIVE, policy, image_batch(policy, 2), brightness)[0].backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def test_gradients_are_those_of_the_weights_with_and_without_recomputation(whole, pipeline_folder):
    """ImageReFL asks the base between its own calls; a LoRA's gradient dA = s·BᵀG of the same weight says what G must be."""
    plain, again = gradients(whole, False), gradients(whole, True)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-7)
    adapted = UNetPolicy.load(pipeline_folder)
    adapted.add_lora(Lora(rank=4, alpha=4.0))
    halves = gradients(adapted, False)  # B = 0: only it has a gradient, dB = G·Aᵀ
    for name, value in halves.items():
        if ".lora_B." in name:
            down = dict(adapted.named_parameters())[name.replace("lora_B", "lora_A")]
            expected = plain[name.split(".lora_")[0] + ".weight"] @ down.T
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_a_consistency_adapter_stays_on_the_base(policy, pipeline_folder):
    fresh = UNetPolicy.load(pipeline_folder)
    for p in (policy, fresh):
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in p.adapters.attach("consistency", Lora(rank=2)).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    policy.tune_weights()
    moved(policy)
    adapted = outputs(fresh.denoiser(PROMPTS, adapter="consistency"))
    assert torch.equal(outputs(policy.denoiser(PROMPTS, adapter="consistency")), adapted)
    base = outputs(fresh.denoiser(PROMPTS))
    assert not torch.allclose(adapted, base) and torch.equal(outputs(policy.denoiser(PROMPTS, adapter="base")), base)
    with pytest.raises(ValueError, match="before full tuning"):
        tuned_whole(pipeline_folder).adapters.attach("consistency", Lora())


def tuned_whole(folder):
    policy = UNetPolicy.load(folder)
    policy.tune_weights()
    return policy


def test_what_cannot_be_tuned_whole_is_refused(pipeline_folder, family_folder):
    from trainer.models.load import load_policy

    with pytest.raises(ValueError, match="needs float32 weights"):
        load_policy(pipeline_folder, dtype=torch.bfloat16).tune_weights()
    with pytest.raises(ValueError, match="is for UNets"):
        load_policy(family_folder("sd3")).tune_weights()
    with pytest.raises(ValueError, match="already has the adapter 'tuned'"):
        tuned_whole(pipeline_folder).add_lora(Lora())


@pytest.mark.parametrize(("family", "dtype", "error"), [("sd15", torch.float32, 2**-23), ("sdxl", torch.bfloat16, 2**-8)])
def test_the_file_holds_what_changed_and_loads_as_the_tuned_model(family, dtype, error, family_folder, tmp_path):
    from trainer.models.load import load_policy

    policy, other = load_policy(family_folder(family)), load_policy(family_folder(family))
    policy.tune_weights()
    moved(policy)
    frozen = "conv_in.bias"
    with torch.no_grad():
        dict(policy.named_parameters())[frozen].copy_(policy.adapters.original[frozen])
    path = tmp_path / "delta.safetensors"
    save_delta(policy, path, {"switch_sigma": 1.5}, None, dtype)
    tensors, metadata, _ = read_lora(path)
    assert len(tensors) == len(policy.named_parameters()) - 1 and "lora_unet_conv_in.diff_b" not in tensors
    assert tensors["lora_unet_conv_in.diff"].dtype == dtype and metadata == {"switch_sigma": 1.5}
    load_lora(other, path)
    for name, value in other.named_parameters():
        change = policy.adapters.original[name] - dict(policy.named_parameters())[name]
        off = (value - dict(policy.named_parameters())[name]).abs()
        assert bool((off <= error * change.abs() + 2**-22 * value.abs()).all()), name
    half = load_policy(family_folder(family))
    load_lora(half, path, 0.5)
    for name, value in half.named_parameters():
        torch.testing.assert_close(value, (policy.adapters.original[name] + dict(other.named_parameters())[name]) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs(other.denoiser(PROMPTS, adapter="base")), outputs(load_policy(family_folder(family)).denoiser(PROMPTS)))


def test_a_file_of_another_model_is_refused_before_anything_is_touched(whole, family_folder, tmp_path):
    from trainer.models.load import load_policy

    save_delta(moved(whole), tmp_path / "d.safetensors", {}, None, torch.float32)
    other = load_policy(family_folder("sdxl"))
    with pytest.raises(ValueError, match="was made for another model"):
        load_lora(other, tmp_path / "d.safetensors")
    assert not other.adapters.tuned


class Brightness:
    differentiable = True

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)


def full_run(pipeline_folder, out, **more):
    """A run of the command, driven by hand so that it can be stopped anywhere."""
    from trainer.data.samples import Samples

    objective = {"name": "refl", "steps": 2, "grad_from": 1, "grad_to": 1}
    config = build(
        TrainConfig,
        {"out": str(out), "tune": "full", "objective": objective, "batch_size": 2, "steps": 3, "save_every": 2, "ema": 0.5, **more},
    )
    return Run(config, Parts(UNetPolicy.load(pipeline_folder), Samples(tuple(PROMPTS)), Brightness()))


def test_a_run_resumes_to_the_same_tensors(pipeline_folder, tmp_path):
    whole = full_run(pipeline_folder, tmp_path / "whole")
    whole.open_folder(overwrite=False, resume=False)
    losses = [s.loss for s in whole.steps()]
    cut = full_run(pipeline_folder, tmp_path / "cut")
    cut.open_folder(overwrite=False, resume=False)
    steps = cut.steps()
    next(steps), next(steps)
    steps.close()
    rest = full_run(pipeline_folder, tmp_path / "cut")
    rest.open_folder(overwrite=False, resume=True)
    assert [s.loss for s in rest.steps()] == losses[2:]
    files = [load_file(tmp_path / n / "delta.safetensors") for n in ("whole", "cut")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert max(losses[1:]) != losses[0] and float(files[0]["lora_unet_conv_in.diff"].abs().max()) > 0


def test_a_lora_is_extracted_from_the_file_and_says_what_it_holds(whole, pipeline_folder, tmp_path, capsys):
    rng, named = torch.Generator().manual_seed(3), dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in named.items():
            if name.endswith(("to_k.weight", "conv2.weight")):
                factors = torch.randn(len(weight), 2, generator=rng), torch.randn(2, weight[0].numel(), generator=rng)
                weight += 0.02 * (factors[0] @ factors[1]).reshape(weight.shape)
    base = file_hash(weight_files(pipeline_folder)[0])
    save_delta(whole, tmp_path / "d.safetensors", {"switch_sigma": 1.5, "base": base}, None, torch.float32)
    arguments = ["convert", str(tmp_path / "d.safetensors"), str(tmp_path / "l.safetensors"), "--rank", "2", "--base"]
    assert main([*arguments, str(pipeline_folder)]) == 0
    assert "holds 100.0% of the change's energy" in capsys.readouterr().out
    adapted = UNetPolicy.load(pipeline_folder)
    assert load_lora(adapted, tmp_path / "l.safetensors")["switch_sigma"] == 1.5
    torch.testing.assert_close(outputs(adapted.denoiser(PROMPTS)), outputs(whole.denoiser(PROMPTS)), rtol=1e-4, atol=1e-4)
    assert main([*arguments, str(pipeline_folder / "vae"), "--overwrite"]) == 2
    assert "was not trained on" in capsys.readouterr().err


def test_a_base_of_several_files_is_known_by_all_of_them(tmp_path):
    """Shards by their index; of variants the one that diffusers loads; one file by its own hash, as ever."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(shards):
        save_file({f"{i}": torch.zeros(3)}, folder / name)
    save_file({"old": torch.zeros(3)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(shards)}}))
    assert weight_files(tmp_path) == [folder / name for name in shards]
    now, earlier = denoiser_hashes(tmp_path)
    assert now == files_hash([folder / name for name in shards]) and earlier == file_hash(folder / "a.safetensors")
    save_file({"1": torch.ones(3)}, folder / shards[1])
    assert denoiser_hashes(tmp_path)[0] != now and denoiser_hashes(tmp_path)[1] == earlier
    (folder / shards[1]).unlink()
    with pytest.raises(ConfigError, match="names model-00002-of-00002.safetensors, which is not there"):
        weight_files(tmp_path)
    one = tmp_path / "one" / "unet"
    one.mkdir(parents=True)
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        save_file({"a": torch.full((3,), float(len(name)))}, one / name)
    assert weight_files(one.parent) == [one / "diffusion_pytorch_model.safetensors"]
    assert denoiser_hashes(one.parent) == tuple(file_hash(one / f"diffusion_pytorch_model{end}.safetensors") for end in ("", ".fp16"))
