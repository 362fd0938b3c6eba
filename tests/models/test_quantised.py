"""fp8 checkpoints with scales: the network in plain weights is the judge; what is not read is refused with its tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands.test_convert import stream_modules
from models.test_load import original_layout, original_unet_names, outputs, single_file, tiny_sd15
from safetensors.torch import load_file, save_file

from trainer.models.load import MODELS, load_policy
from trainer.models.quantised import read_scaled
from trainer.models.single_file import _check_all_read, clip_tokenizer
from trainer.models.unet import UNetPolicy

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny policy and its tensors in the original layout."""
    import diffusers
    import transformers

    config = tiny_sd15()
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**config.parts["unet"][1]),
        "vae": diffusers.AutoencoderKL(**config.parts["vae"][1]),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.parts["text_encoder"][1])).eval(),
    }
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    words, scheduler = clip_tokenizer(tmp_path_factory.mktemp("words")), diffusers.DDPMScheduler(**config.scheduler[1])
    policy = UNetPolicy(diffusers.StableDiffusionPipeline(**parts, tokenizer=words, scheduler=scheduler, **more))
    return policy, original_layout(policy)


def scaled(tensors, spelling="scale_weight", rows=False):
    """As ComfyUI writes it: matrices of the UNet in fp8, each divided by a scale of its own."""
    found = dict(tensors)
    for key in [k for k, v in tensors.items() if k.startswith(PREFIX) and k.endswith("weight") and v.ndim == 2]:
        size = tensors[key].abs().amax(1, keepdim=True) if rows else tensors[key].abs().amax()
        scale = size / 448
        found[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        stem = key.removesuffix("weight")
        found[stem + spelling] = scale if rows else scale.reshape(() if spelling == "weight_scale" else 1)
        found[stem + {"scale_weight": "scale_input", "weight_scale": "input_scale"}[spelling]] = torch.ones(1)
        if spelling == "weight_scale":
            found[stem + "comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    if spelling == "scale_weight":
        found[PREFIX + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return found


@pytest.mark.parametrize(("spelling", "rows"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)])
def test_a_scaled_checkpoint_is_the_plain_one_up_to_rounding(tiny, tmp_path, spelling, rows):
    policy, tensors = tiny
    save_file(scaled(tensors, spelling, rows), tmp_path / "scaled.safetensors")
    again = single_file(tmp_path / "scaled.safetensors", tiny_sd15())
    expected = outputs(policy)
    off = float((outputs(again) - expected).norm() / expected.norm())
    assert 0 < off < 0.02, off


def test_read_weights_are_the_stored_ones_times_their_scales(tmp_path):
    weight, rows = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(6, 1)
    save_file(
        {"a.weight": weight, "a.scale_weight": torch.tensor([0.5]), "b.weight": weight.clone(), "b.weight_scale": rows},
        tmp_path / "a.safetensors",
    )
    found = read_scaled(tmp_path / "a.safetensors", torch.float32)
    assert set(found) == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], weight.float() * 0.5) and torch.equal(found["b.weight"], weight.float() * rows)


def test_other_quantisations_are_refused_with_their_tensor(tmp_path):
    fp8, file = torch.zeros(6, 4, dtype=torch.float8_e4m3fn), tmp_path / "a.safetensors"
    nvfp4 = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    one = torch.ones(1)
    cases = [
        ({"a.weight": fp8, "a.weight_scale": one, "a.weight_scale_2": one}, "a.weight_scale_2"),
        ({"a.weight": fp8.to(torch.uint8), "a.weight_scale": one}, "a.weight is stored as torch.uint8"),
        ({"a.weight": fp8, "a.weight_scale": one, "a.comfy_quant": nvfp4}, "stored as nvfp4"),
        ({"a.weight.absmax": one, "a.weight": fp8}, "a.weight.absmax"),
        ({"a.weight": fp8, "a.SCB": torch.ones(6)}, "a.SCB"),
        ({"b.weight": fp8, "a.scale_weight": one}, "a.scale_weight"),
        ({"a.weight": fp8, "a.scale_weight": torch.ones(3)}, r"the scale of a.weight has shape \(3,\)"),
        ({"a.weight": fp8, "a.scale_weight": one / 0}, "the scale of a.weight is not finite"),
    ]
    for tensors, message in cases:
        save_file({key: value.clone() for key, value in tensors.items()}, file)
        with pytest.raises(ValueError, match=message) as caught:
            read_scaled(file, torch.float32)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    save_file({"a.weight": fp8}, file, {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "int8"}}})})
    with pytest.raises(ValueError, match="a is stored as int8"):
        read_scaled(file, torch.float32)


def test_a_quantised_text_encoder_is_refused_by_name(tiny, tmp_path):
    _, tensors = tiny
    key = next(k for k, v in tensors.items() if k.startswith("cond_stage_model.") and v.ndim == 2)
    save_file({**tensors, key.removesuffix("weight") + "scale_weight": torch.ones(1)}, tmp_path / "te.safetensors")
    with pytest.raises(ValueError, match=r"its text_encoder is quantised \(.*scale_weight\): name a diffusers folder"):
        single_file(tmp_path / "te.safetensors", tiny_sd15())


def test_a_tensor_of_the_unet_that_nothing_reads_is_refused(tiny, tmp_path):
    """As the guidance embedding of an LCM's UNet, without which it is another model."""
    _, tensors = tiny
    save_file({**tensors, PREFIX + "time_embed.cond_proj.weight": torch.zeros(8, 8)}, tmp_path / "lcm.safetensors")
    with pytest.raises(
        ValueError, match=r"holds 1 tensors that UNet2DConditionModel has no place for, first .*time_embed\.cond_proj\.weight"
    ):
        single_file(tmp_path / "lcm.safetensors", tiny_sd15())


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sd35-medium", "flux-dev"])
def test_no_tensor_of_a_published_model_is_taken_for_unread(name):
    """Names and shapes of the original checkpoints, and one more that each converter leaves."""
    import diffusers

    family, config = MODELS[name]
    (_, kind), settings = config.parts[family.network_name]
    if family.network_name == "unet":
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**settings)
        sizes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
        shapes = {PREFIX + a: sizes[b] for a, b in original_unet_names(unet).items()}
    else:
        stream = "flux" if name.startswith("flux") else "sd3"
        modules = stream_modules(stream)
        shapes = {f"{PREFIX}{n}.weight": s for n, s in modules.items()} | {f"{PREFIX}{n}.bias": s[:1] for n, s in modules.items()}
        if stream == "flux":
            norms = [f"double_blocks.0.{side}_attn" for side in ("img", "txt")] + ["single_blocks.0"]
            shapes |= {f"{PREFIX}{n}.norm.{end}_norm.scale": (4,) for n in norms for end in ("query", "key")}
        else:
            shapes |= {
                PREFIX + "pos_embed": (1, 4, 8),
                PREFIX + "x_embedder.proj.weight": (8, 16, 2, 2),
                PREFIX + "x_embedder.proj.bias": (8,),
            }
    _check_all_read(Path("a"), family, config, shapes)
    with pytest.raises(ValueError, match=f"holds 1 tensors that {kind} has no place for, first .*strange"):
        _check_all_read(Path("a"), family, config, {**shapes, PREFIX + "strange.weight": (4,)})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_scales_or_values_that_are_not_finite_is_refused(part, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("sd15"), tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(k for k, v in tensors.items() if v.ndim == 2)
    save_file({**tensors, name.removesuffix("weight") + "scale_weight": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{file} is quantised \(.*scale_weight\), and would load without its scales"):
        load_policy(folder)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"is damaged: .* of its {part} has values that are not finite"):
        load_policy(folder)
