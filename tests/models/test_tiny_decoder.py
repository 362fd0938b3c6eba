"""Reward gradients through an AutoencoderTiny: diffusers' own decoding, the gradient by hand, the layouts of files, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.runs import plan_config, settings
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trainer.__main__ import main
from trainer.memory.planner import Planner
from trainer.models.load import load_policy
from trainer.models.open import open_gradient_vae
from trainer.models.qwen import QwenPolicy
from trainer.models.tiny_decoder import WEIGHTS, load_tiny_decoder
from trainer.training import checkpoint


def tiny(channels=4, **more):
    """A random AutoencoderTiny whose scale and shift would show."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(channels)
    sizes = {"encoder_block_out_channels": (8,) * 4, "num_encoder_blocks": (1,) * 4, "decoder_block_out_channels": (8,) * 4}
    vae = AutoencoderTiny(**sizes, num_decoder_blocks=(2, 1, 1, 1), latent_channels=channels, **more)
    with torch.no_grad():
        vae.decoder.layers[-1].bias.fill_(0.5)
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The diffusers folder of a random AutoencoderTiny of the SD1.5 class."""
    path = tmp_path_factory.mktemp("tiny") / "taesd"
    tiny().save_pretrained(path)
    return path


FULL = pytest.mark.full


@pytest.mark.parametrize("name", ["sd15", "sd3", *(pytest.param(n, marks=FULL) for n in ("sdxl", "flux-dev", "z-image", "chroma"))])
def test_it_decodes_what_the_pipeline_with_this_vae_decodes(name, family_folder, tmp_path):
    policy = load_policy(family_folder(name))
    vae = tiny(policy.latent_shape[0], scaling_factor=1.25, shift_factor=0.0 if name in ("sd15", "sdxl") else 0.2)
    vae.save_pretrained(tmp_path / policy.tiny_decoder)
    open_gradient_vae(policy, str(tmp_path / policy.tiny_decoder))
    pipeline = type(policy.pipeline)(**{**policy.pipeline.components, "vae": vae})
    pipeline.set_progress_bar_config(disable=True)

    def drawn(kind):
        size = {"height": 64, "width": 64, "num_inference_steps": 2}
        return pipeline("a red star", **size, generator=torch.Generator().manual_seed(1), output_type=kind).images

    latents, images = drawn("latent"), drawn("pt")
    if latents.ndim == 3:  # FLUX.1's are packed
        latents = pipeline._unpack_latents(latents, 64, 64, pipeline.vae_scale_factor)
    ours = policy.decode(latents.detach().float().requires_grad_())
    assert ours.requires_grad and float(images.std()) > 0.01
    torch.testing.assert_close(ours, images, atol=2e-6, rtol=0)


def test_gradients_go_through_it_and_everything_else_through_the_vae(folder, pipeline_folder):
    policy = load_policy(pipeline_folder)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole = policy.autoencoder.decode(latents)
    open_gradient_vae(policy, str(folder))
    with torch.no_grad():
        torch.testing.assert_close(policy.decode(latents), whole, atol=0, rtol=0)
    state, x = load_file(folder / WEIGHTS), latents.clone().requires_grad_()
    images = (by_hand(state, x) * 2 - 1).div(2).add(0.5).clamp(0, 1)
    (expected,) = torch.autograd.grad((images * weight).sum(), x)
    assert (images - whole).abs().mean() > 0.01
    for slicing, recompute in ((False, False), (True, False), (False, True)):
        policy.autoencoder.slicing = slicing
        policy.gradient_checkpointing(denoiser=False, vae=recompute)
        leaf = latents.clone().requires_grad_()
        ours = policy.decode(leaf)
        torch.testing.assert_close(ours, images, atol=1e-6, rtol=0)
        (ours * weight).sum().backward()
        torch.testing.assert_close(leaf.grad, expected, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in policy.autoencoder.tiny.parameters())


def by_hand(state, x, prefix="decoder.layers."):
    """The decoder written out: tanh clamp, convolutions, blocks of three with a skip, doubled rows and columns between levels."""
    x, layer = 3 * torch.tanh(x / 3), 0
    numbers = sorted({int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)})
    for position, layer in enumerate(numbers):
        get = lambda name, layer=layer: state.get(f"{prefix}{layer}.{name}")  # noqa: E731
        if get("weight") is not None:
            if 0 < position < len(numbers) - 1:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = F.conv2d(x, get("weight"), get("bias"), padding=1)
            x = x.relu() if position == 0 else x
            continue
        if get("pool.0.weight") is not None:
            wide = F.group_norm(F.conv2d(x, get("pool.0.weight")), 4, get("pool.1.weight"), get("pool.1.bias"))
            x = x + F.conv2d(wide.relu(), get("pool.3.weight"))
        inner = x
        for part in (0, 2, 4):
            inner = F.conv2d(inner if part == 0 else inner.relu(), get(f"conv.{part}.weight"), get(f"conv.{part}.bias"), padding=1)
        x = (inner + x).relu()
    return x


def original(state):
    """The decoder's tensors under the names of the original file."""
    names = {key: key.removeprefix("decoder.layers.").split(".", 1) for key in state if key.startswith("decoder.")}
    return {f"{int(number) + 1}.{rest}": state[key] for key, (number, rest) in names.items()}


def test_every_layout_of_the_file_is_the_same_decoder(folder, pipeline_folder, tmp_path):
    policy, state = load_policy(pipeline_folder), load_file(folder / WEIGHTS)
    latents = torch.randn(1, *policy.latent_shape)
    expected = load_tiny_decoder(policy, folder)(latents)
    save_file(original(state), tmp_path / "taesd_decoder.safetensors")
    comfy = {f"taesd_decoder.{key}": value for key, value in original(state).items()} | {"vae_scale": torch.tensor(0.18215)}
    save_file(comfy, tmp_path / "vae.safetensors")
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    for name in ("taesd_decoder.safetensors", "vae.safetensors", "half.safetensors"):
        found = load_tiny_decoder(policy, tmp_path / name)(latents)
        torch.testing.assert_close(found, expected, atol=1e-3 if name.startswith("half") else 0, rtol=0)


@FULL
def test_taef2_decodes_patches_of_flux2_with_its_pooled_blocks(family_folder, tmp_path):
    policy, state = load_policy(family_folder("klein")), tiny(8).state_dict()
    rng = torch.Generator().manual_seed(3)
    for layer in (2, 3):
        shapes = {"0.weight": (32, 8, 1, 1), "1.weight": (32,), "1.bias": (32,), "3.weight": (8, 32, 1, 1)}
        state |= {f"decoder.layers.{layer}.pool.{key}": 0.3 * torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    save_file(original(state), tmp_path / "taef2_decoder.safetensors")
    open_gradient_vae(policy, str(tmp_path / "taef2_decoder.safetensors"))
    latents = torch.randn(1, *policy.latent_shape, generator=rng)
    own = latents.reshape(1, 8, 2, 2, *latents.shape[-2:]).permute(0, 1, 4, 2, 5, 3).reshape(1, 8, *(2 * s for s in latents.shape[-2:]))
    leaf = latents.requires_grad_()
    torch.testing.assert_close(policy.decode(leaf), by_hand(state, own).clamp(0, 1), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused_in_one_line(folder, pipeline_folder, tmp_path, monkeypatch):
    policy, state = load_policy(pipeline_folder), load_file(folder / WEIGHTS)
    tiny(16).save_pretrained(tmp_path / "mine")
    save_file({"0.weight": torch.ones(64, 3, 3, 3), "1.conv.0.weight": torch.ones(8, 8, 3, 3)}, tmp_path / "encoder.safetensors")
    last = max(key for key in state if key.startswith("decoder"))
    save_file({**state, last: state[last] * torch.nan}, tmp_path / "nan.safetensors")
    save_file({key: value for key, value in state.items() if key != last}, tmp_path / "short.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    shutil.copytree(folder, tmp_path / "kl")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "kl" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    shutil.copytree(folder, tmp_path / "taesdxl")
    for name, message in {
        "mine": "decodes 16 channels at 8 pixels a latent, this model's latents have 4 at 8: use taesd",
        "taesdxl": "is named as taesdxl, another model's: for StableDiffusionPipeline use taesd",
        "encoder.safetensors": "is not the decoder of an AutoencoderTiny: give taesd_decoder.safetensors",
        "nan.safetensors": "has values that are not finite",
        "short.safetensors": "does not hold the decoder of an AutoencoderTiny",
        "cut.safetensors": "was its download cut short",
        "kl": "config.json is not an AutoencoderTiny's",
        "nowhere": "give a diffusers folder of an AutoencoderTiny",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            open_gradient_vae(policy, str(tmp_path / name))
        assert str(error.value).startswith("gradient_vae: ") and "\n" not in str(error.value)
    monkeypatch.setattr(type(policy), "tiny_decoder", QwenPolicy.tiny_decoder)
    with pytest.raises(ValueError, match="no AutoencoderTiny decodes the latents of StableDiffusionPipeline"):
        open_gradient_vae(policy, str(folder))


def test_one_of_another_model_is_told_by_its_images(folder, tmp_path, caplog):
    from trainer.models.open import open_policy

    open_gradient_vae(open_policy("demo"), "demo")
    assert not caplog.records
    open_gradient_vae(open_policy("demo"), str(folder))
    assert "correlate with the VAE's by" in caplog.text and "use taesd" in caplog.text


def test_a_run_records_it_and_resumes_with_it_alone(folder, pipeline_folder, reward_folder, image_folder, tmp_path, capsys):
    mine, moved, run = tmp_path / "taesd", tmp_path / "elsewhere" / "taesd", tmp_path / "run"
    shutil.copytree(folder, mine)

    def train(out, steps, *flags):
        return main(["train", *settings(pipeline_folder, reward_folder, image_folder, out, steps=steps), *flags])

    assert train(run, 1, f"--gradient_vae={mine}") == 0
    assert set(checkpoint.load(run / "checkpoint.pt")["data"]) == {"images", "gradient_vae"}
    shutil.move(mine, moved)
    assert train(run, 2, f"--gradient_vae={moved}", "--resume") == 0
    state = load_file(moved / WEIGHTS)
    save_file({key: value * 1.01 for key, value in state.items()}, moved / WEIGHTS)
    capsys.readouterr()
    for flags, message in ([f"--gradient_vae={moved}"], "other weights"), ([], "another gradient_vae"):
        assert train(run, 3, *flags, "--resume") == 2
        assert message in capsys.readouterr().err


def test_the_plan_counts_it_and_the_smaller_decoding(folder):
    planned = Planner()
    whole, small = planned(plan_config()), planned(plan_config(gradient_vae=str(folder)))
    decoder = [value for key, value in load_file(folder / WEIGHTS).items() if key.startswith("decoder.")]
    assert small.components["small decoder weights"] == sum(-(-v.nbytes // 512) * 512 for v in decoder)
    assert small.components["VAE weights"] == whole.components["VAE weights"]
    assert small.components["VAE decoder"] < 0.3 * whole.components["VAE decoder"]
