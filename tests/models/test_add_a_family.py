"""A new model family is one file and one entry of the table: folders load, a rollout is the pipeline's, a LoRA trains and loads."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from conftest import t5_tokenizer
from models.snippets.family import AuraFlowPolicy
from transformers import UMT5Config, UMT5EncoderModel

from trainer.__main__ import main
from trainer.lora.file import load_lora, save_lora
from trainer.models import load
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.sampling import end_of, trajectory

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random AuraFlow in diffusers' layout."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=40, d_model=64, d_kv=8, d_ff=64, num_layers=1, num_heads=2)).eval(),
        vae=diffusers.AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, scaling_factor=0.13, **blocks),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    place = tmp_path_factory.mktemp("auraflow")
    pipeline.save_pretrained(place)
    return place


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(load, "FAMILIES", [*load.FAMILIES, AuraFlowPolicy])


def test_without_its_entry_the_folder_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="AuraFlowPipeline"):
        load.load_policy(folder)


def test_a_rollout_ends_where_the_pipeline_ends(listed, folder):
    policy = load.load_policy(folder)
    noise = Rng(3, 0, (0, 1)).normal("start", policy.latent_shape)
    steps = trajectory(policy.denoiser(PROMPTS), policy.start(noise, 5), policy.sigmas(5), lambda i: noise, "ddim", space=policy.space)
    with torch.no_grad():
        ours = end_of(noise, steps)
        theirs = policy.pipeline(
            PROMPTS, num_inference_steps=5, guidance_scale=1.0, latents=noise, height=16, width=16, output_type="latent", return_dict=False
        )[0]
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_a_lora_trains_and_its_file_loads(listed, folder, tmp_path):
    policy = load.load_policy(folder)
    policy.add_lora(Lora(rank=2, alpha=2.0))
    x, sigma = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.8, 0.4])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    policy.denoiser(PROMPTS)(x, sigma).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in policy.parameters())
    save_lora(policy, tmp_path / "lora.safetensors", {})
    again = load.load_policy(folder)
    load_lora(again, tmp_path / "lora.safetensors")
    with torch.no_grad():
        tuned, base = (policy.denoiser(PROMPTS, adapter=name)(x, sigma) for name in ("tuned", "base"))
        assert float((again.denoiser(PROMPTS)(x, sigma) - tuned).abs().max()) < 1e-5 * float((tuned - base).abs().max())


def test_the_train_command_takes_it_and_plans_it(listed, folder, reward_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [f"--model={folder}", f"--reward={reward_folder}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'run'}"]
    arguments += [
        "--objective.name=draft-k",
        "--objective.steps=2",
        "--batch_size=2",
        "--steps=1",
        "--gradient_checkpointing_denoiser=true",
    ]
    assert main(["train", *arguments, "--plan"]) == 0
    assert "total" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(["train", *arguments]) == 0
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["grad_norm"] > 0
