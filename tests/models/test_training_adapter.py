"""A training adapter: training is that of the base with B·A merged by hand, drawing and results are those of the base without it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.losses import loss_of
from helpers.runs import plan_config, settings
from helpers.unet import OBJECTIVE, PROMPTS, brightness, image_batch
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.generate import Generation, generate
from trainer.guidance import combined
from trainer.lora.file import load_training_adapter
from trainer.memory.planner import Planner
from trainer.models.load import load_policy
from trainer.policy import Lora
from trainer.training import checkpoint

FAMILIES = {
    "sd15": ("unet", "unet", ("attn1.to_q", "attn2.to_v", "ff.net.2")),
    "z-image": ("transformer", "diffusion_model", ("to_q", "w1")),
}
"""The network's folder, the beginning of the file's names, and the modules that the training adapter adapts."""


def adapter_and_merged(family, folder, path, scale=0.3):
    """A training adapter's file, and a copy of the model's folder with W + B·A in its weights: no code of the adapters is used."""
    part, prefix, targets = FAMILIES[family]
    shutil.copytree(folder, path / "merged")
    (file,) = (path / "merged" / part).glob("*.safetensors")
    weights, rng = load_file(file), torch.Generator().manual_seed(8)
    tensors = {}
    for name in [key for key in weights if key.removesuffix(".weight").endswith(targets)]:
        outputs, inputs = weights[name].shape
        down, up = (scale * torch.randn(shape, generator=rng) for shape in ((3, inputs), (outputs, 3)))
        weights[name] += up @ down
        key = f"{prefix}.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    assert len(tensors) > 4
    save_file(weights, file, {"format": "pt"})
    save_file(tensors, path / "adapter.safetensors")
    return path / "adapter.safetensors", path / "merged"


def with_lora(policy, seed=6):
    policy.add_lora(Lora(rank=4, alpha=4.0))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return policy


def gradient(policy):
    """ImageReFL's loss, with a KL term to the base model and a diffusion loss, and its gradient."""
    latents = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    loss, _ = loss_of(OBJECTIVE, policy, replace(image_batch(policy), latents=latents), brightness)
    return loss.detach().reshape(1), torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])


def drawn(policy):
    mix = combined(Generation(steps=6, guidance_scale=2.0).base, Generation().tuned(), 2)
    return generate(policy, PROMPTS, Generation(steps=6, guidance_scale=2.0), {"": mix})[""]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.full), "z-image"])
def test_training_is_that_of_the_merged_base_and_drawing_that_of_the_base(family, family_folder, tmp_path):
    """Loss and gradient of ImageReFL, with recomputation and with rollouts merged into the weights; images of base and LoRA."""
    folder = family_folder(family)
    file, merged = adapter_and_merged(family, folder, tmp_path)
    policy = load_policy(folder, image_size=64)
    load_training_adapter(policy, file)
    with_lora(policy)
    byhand, alone = (with_lora(load_policy(path, image_size=64)) for path in (merged, folder))
    expected, naive, images = gradient(byhand), gradient(alone), drawn(alone)
    print(family, *(f"{error(a, b):.1e}" for a, b in zip(naive, expected)), f"{error(drawn(byhand), images):.1e}")
    assert error(naive[0], expected[0]) > 1e-4 and error(naive[1], expected[1]) > 0.02 and error(drawn(byhand), images) > 1e-3
    for recompute, merge in ((False, False), (True, False), (False, True)):
        policy.gradient_checkpointing(denoiser=recompute, vae=False)
        policy.merge_rollouts = merge
        with policy.adapters.without_training():
            assert error(drawn(policy), images) < 1e-5
        found = gradient(policy)
        print(family, recompute, merge, *(f"{error(a, b):.1e}" for a, b in zip(found, expected)))
        assert error(found[0], expected[0]) < 1e-6 and error(found[1], expected[1]) < 1e-5
    assert error(drawn(policy), drawn(byhand)) < 1e-4
    with policy.merged(), policy.adapters.without_training():
        assert error(drawn(policy), images) < 1e-4
    assert "training_adapter" not in policy.adapters
    with pytest.raises(ValueError, match="no adapter 'training_adapter' is loaded: use one of base, tuned"):
        policy.denoiser(PROMPTS, adapter="training_adapter")


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


FULL = pytest.param({"tune": "full", "learning_rate": 1e-4}, marks=pytest.mark.full)


@pytest.mark.parametrize("more", [{}, FULL], ids=["lora", "full"])
def test_a_run_is_one_on_the_merged_base_and_its_result_has_no_part_of_it(
    more, pipeline_folder, reward_folder, heldout_folder, image_folder, tmp_path, capsys
):
    """The watch before training is that of the plain base; a run resumes with the adapter of this content, wherever it lies."""
    file, merged = adapter_and_merged("sd15", pipeline_folder, tmp_path, 0.1)
    watch = {"watch.every": 2, "watch.heldout": str(heldout_folder), "watch.count": 1, "watch.images": 2, "watch.steps": 3}
    common = (reward_folder, image_folder)

    def train(model, out, *flags, steps=2, **given):
        given = {**watch, **more, **given}
        return main(
            ["train", *settings(model, *common, tmp_path / out, steps=steps, ema=0.0, gradient_accumulation_steps=1, **given), *flags]
        )

    adapter = {"training_adapter": str(file)}
    assert train(pipeline_folder, "run", steps=1, **adapter) == 0
    shutil.move(file, tmp_path / "moved.safetensors")
    adapter = {"training_adapter": str(tmp_path / "moved.safetensors")}
    assert train(pipeline_folder, "run", "--resume", **adapter) == 0
    assert train(merged, "byhand") == 0 and train(pipeline_folder, "plain", steps=1) == 0
    name = "delta" if more else "lora"
    result, expected = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "byhand"))
    assert result.keys() == expected.keys()
    worst = max(error(result[key], value) for key, value in expected.items() if float(value.abs().max()) > 0)
    losses = [[line["loss"] for line in logged(tmp_path / run)] for run in ("run", "byhand", "plain")]
    points = [json.loads((tmp_path / run / "watch.json").read_text()) for run in ("run", "byhand", "plain")]
    print(f"{name}: {worst:.1e}", losses, [p[0]["heldout"] for p in points])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != pytest.approx(losses[2][0], rel=1e-3)
    assert worst < (0.2 if more else 1e-2)  # AdamW divides by the gradient, which rounds
    assert points[0][0]["heldout"] == pytest.approx(points[2][0]["heldout"], rel=1e-5)
    assert points[0][0]["heldout"] != pytest.approx(points[1][0]["heldout"], rel=1e-3)
    assert set(checkpoint.load(tmp_path / "run" / "checkpoint.pt")["data"]) == {"images", "training_adapter"}
    capsys.readouterr()
    save_file({key: 1.01 * value for key, value in load_file(tmp_path / "moved.safetensors").items()}, tmp_path / "other.safetensors")
    for given, message in (({"training_adapter": str(tmp_path / "other.safetensors")}, "other weights"), ({}, "another training_adapter")):
        assert train(pipeline_folder, "run", "--resume", steps=3, **given) == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_the_plan_counts_it_and_one_of_another_model_is_refused(family_folder, pipeline_folder, tmp_path, capsys):
    (tmp_path / "z").mkdir()
    file, _ = adapter_and_merged("sd15", pipeline_folder, tmp_path)
    other, _ = adapter_and_merged("z-image", family_folder("z-image"), tmp_path / "z")
    plain, larger = (
        Planner()(plan_config(model=str(pipeline_folder), **more)).components["denoiser weights"]
        for more in ({}, {"training_adapter": str(file)})
    )
    assert larger - plain == sum(-(-value.nbytes // 512) * 512 for value in load_file(file).values())
    for path, message in ((other, "is for Lumina or another Z-Image"), (tmp_path / "none.safetensors", "no LoRA file")):
        flags = [f"--model={pipeline_folder}", "--images=demo", f"--training_adapter={path}", f"--out={tmp_path / 'run'}"]
        for end in ([], ["--plan"]):
            assert main(["train", *flags, *end]) == 2
            err = capsys.readouterr().err
            assert "training_adapter: " in err and message in err and len(err.strip().splitlines()) == 1
