"""From paths to policies: folders, the authors' two UNets, single files in their original layout, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
from helpers.original_names import original_vae
from safetensors.torch import load_file, save_file

from trainer.lora.names import canonical
from trainer.models.configs import CLIP_L, VAE
from trainer.models.load import MODELS, detect, load_policy, resolve
from trainer.models.sdxl import SDXL_UNET
from trainer.models.second import with_network
from trainer.models.single_file import clip_tokenizer, single_file_pipeline
from trainer.models.unet import SD15_UNET, UNetPolicy

PROMPTS = ["a red star", "a blue ring, blurred"]


def outputs(policy):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS, guidance_scale=3.0)(x, torch.tensor([0.8, 0.4]))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_a_folder_says_its_own_family(family_folder, family):
    policy = load_policy(family_folder(family), image_size=64)
    name = json.loads((family_folder(family) / "model_index.json").read_text())["_class_name"]
    assert type(policy) is resolve(family_folder(family))[0] and policy.pipeline_name == name


def test_other_folders_and_files_are_refused_with_one_line(family_folder, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        load_policy(folder)
    (folder / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    with pytest.raises(ValueError, match="is a Flux2Pipeline, which is not supported; nearest: FluxPipeline: known are "):
        load_policy(folder)
    (folder / "model_index.json").write_text('{"_class_name": "WuerstchenPipeline"}')
    with pytest.raises(ValueError, match="is a WuerstchenPipeline: known are StableDiffusionPipeline, StableDiffusionXLPipeline, "):
        load_policy(folder)
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_policy(tmp_path / "none.safetensors")
    file = tmp_path / "a.ckpt"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="only .safetensors"):
        load_policy(file)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_policy(file)
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="a.safetensors: it is a LoRA"):
        load_policy(file)
    save_file({"some.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a known model"):
        load_policy(file)
    with pytest.raises(ValueError, match="is for UNets"):
        load_policy(family_folder("sd3"), prediction="v_prediction")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_damaged_or_wrong_weights_is_refused_with_the_file_that_is_to_blame(part, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("sd15"), tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name, value = next((k, v) for k, v in tensors.items() if v.ndim == 2)
    save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"the files of its {part} lack 1 weights.*, or are another model's"):
        load_policy(folder)
    save_file({**tensors, name: torch.zeros(len(value) + 1, value.shape[1])}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded|another model's") as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} is not a readable safetensors file.*cut short"):
        load_policy(folder)
    (folder / part / "config.json").write_text("{")
    file.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(folder)


def test_prediction_can_be_said(family_folder):
    a, b = load_policy(family_folder("sd15")), load_policy(family_folder("sd15"), prediction="v_prediction")
    assert (a.prediction_type, b.prediction_type) == ("epsilon", "v_prediction") and not torch.allclose(outputs(a), outputs(b))


def test_the_authors_folder_is_base_and_tuned_model(family_folder, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(family_folder("sd15"), folder)
    (folder / "unet").rename(folder / "original_unet")
    shutil.copytree(folder / "original_unet", folder / "fine_tuned_unet")
    (folder / "model_index.json").write_text('{"_class_name": ["combined_stable_diffusion", "CombinedStableDiffusion"]}')
    base = load_policy(folder)
    assert torch.equal(outputs(base), outputs(load_policy(family_folder("sd15"))))
    assert torch.equal(outputs(with_network(base, folder / "fine_tuned_unet")), outputs(base))
    for p in base.network.parameters():
        p.data.mul_(1.1)
    tuned = with_network(base, folder / "fine_tuned_unet")
    assert tuned.vae is base.vae and not torch.allclose(outputs(tuned), outputs(base))
    with pytest.raises(ValueError, match="a model of another size or family"):
        with_network(load_policy(family_folder("sdxl")), folder / "fine_tuned_unet")


def test_clips_tokenizer_from_open_clip_gives_open_clips_tokens(tmp_path):
    text = "A photo of a café-racer, 8k;   the dog's «tail» & naïve ÆØÅ!"
    ours, theirs = clip_tokenizer(tmp_path), open_clip.get_tokenizer("ViT-L-14")(text)[0]
    tokens = torch.tensor(ours(text, padding="max_length", max_length=77).input_ids)
    end = int((tokens == 49407).nonzero()[0, 0])
    assert torch.equal(tokens[: end + 1], theirs[: end + 1]) and bool((tokens[end:] == 49407).all())
    assert clip_tokenizer(tmp_path, "!")("a", padding="max_length", max_length=4).input_ids[-1] == 0


def true_shapes(name):
    """Names and shapes of a published checkpoint that tell it apart, from its original layout."""
    prefix = "model.diffusion_model."
    widths = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
    if name in widths:
        return {
            prefix + "input_blocks.0.0.weight": (320, 4, 3, 3),
            prefix + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, widths[name]),
        }
    if name.startswith("flux2"):
        width = 3072 if name.endswith("4b") else 4096
        return {"double_blocks.0.img_attn.qkv.weight": (3 * width, width), "double_stream_modulation_img.lin.weight": (6 * width, width)}
    if name.startswith("z-image"):
        return {"noise_refiner.0.attention.qkv.weight": (11520, 3840), "cap_embedder.1.weight": (3840, 2560)}
    if name == "chroma":
        return {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "distilled_guidance_layer.in_proj.weight": (5120, 64)}
    if name == "anima":
        return {
            f"net.{key}": shape
            for key, shape in (
                ("blocks.0.mlp.layer1.weight", (8192, 2048)),
                ("x_embedder.proj.1.weight", (2048, 68)),
                ("llm_adapter.embed.weight", (32128, 1024)),
            )
        }
    if name == "qwen-image":
        return {"txt_norm.weight": (3584,), "img_in.weight": (3072, 64)}
    if name.startswith("krea2"):
        return {"txtfusion.projector.weight": (1, 12), "first.weight": (6144, 64)}
    if name.startswith("flux"):
        guided = {"guidance_in.in_layer.weight": (3072, 256)} if name == "flux-dev" else {}
        return {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), **guided}
    width = 2432 if name == "sd35-large" else 1536
    dual = {"joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)} if name == "sd35-medium" else {}
    return {prefix + "joint_blocks.0.x_block.attn.qkv.weight": (3 * width, width)} | {prefix + k: v for k, v in dual.items()}


@pytest.mark.parametrize("name", MODELS)
def test_single_files_are_known_by_their_shapes(name):
    assert detect(true_shapes(name)) == name.removesuffix("-turbo")  # which has its base's shapes


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            ("blocks.0.self_attn.q.weight", "head.modulation"),
            r"it is Wan, which is not supported \(blocks.0.self_attn.q.*\); nearest: flux-dev",
        ),
        (("layers.0.attention.qkv.weight", "cap_embedder.0.weight"), "it is Lumina or another Z-Image, .*; nearest: z-image"),
        (("double_stream_blocks.0.block.ff_i.shared_experts.w1.weight",), "it is HiDream, .*; nearest: flux-dev"),
        (("input_hint_block.0.weight",), "it is ControlNet, .*; nearest: its base model's UNet"),
        (("encoder.conv_in.weight", "decoder.conv_in.weight"), "it is an autoencoder, not a model: give the file of the network"),
        (("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), "it is a text encoder, not a model"),
        (("blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"), "it is a Cosmos Predict2 .*: of that architecture only Anima is"),
        (("something.weight",), "it is not a known model: known are sd15"),
    ],
)
def test_a_family_that_is_not_known_is_named_with_the_nearest(keys, expected):
    for prefix in ("", "model.diffusion_model."):
        with pytest.raises(ValueError, match=expected):
            detect({prefix + key: (8, 8) for key in keys})


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_edm_models_are_refused_by_their_marker(marker):
    with pytest.raises(ValueError, match=f"EDM model \\({marker}\\)"):
        detect({**true_shapes("sdxl"), marker: (4,)})


def test_a_marker_of_zero_snr_alone_is_no_epsilon_prediction(tmp_path):
    save_file({key: torch.empty(shape) for key, shape in {**true_shapes("sdxl"), "ztsnr": (0,)}.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="marker ztsnr without v_pred: say prediction = v_prediction"):
        load_policy(tmp_path / "a.safetensors")


def test_zero_snr_can_be_said(family_folder):
    policy = load_policy(family_folder("sdxl"), prediction="v_prediction+ztsnr")
    assert policy.prediction_type == "v_prediction" and float(policy.sigmas(3)[0]) == pytest.approx(4518.76, abs=0.01)
    with pytest.raises(ValueError, match=r"use epsilon, v_prediction or v_prediction\+ztsnr"):
        load_policy(family_folder("sdxl"), prediction="epsilon+ztsnr")


def test_inpainting_and_the_refiner_are_refused():
    with pytest.raises(ValueError, match="9 channels"):
        detect({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)})
    with pytest.raises(ValueError, match="not a known model"):
        detect({"input_blocks.0.0.weight": (384, 4, 3, 3), "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280)})


@pytest.mark.parametrize(
    ("name", "modules"),
    [("SD15", SD15_UNET), ("SDXL", SDXL_UNET)],
)
def test_original_names_of_the_true_unets_are_all_known(name, modules):
    """diffusers' converter and our names agree on every module of the published UNets (shapes alone, no memory)."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**modules)
    original = original_unet_names(unet)
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": k for k in original}, dict(unet.config))
    assert {value: key for key, value in converted.items()} == original
    assert set(converted) == set(unet.state_dict())


def original_unet_names(unet):
    """The original name of every weight of a UNet: all names such a UNet may have, by what `canonical` calls them."""
    wanted = set(unet.state_dict())
    residual = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    block = [f"attn{i}.{end}" for i in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")]
    block += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    attention = ["norm", "proj_in", "proj_out", *(f"transformer_blocks.{i}.{part}" for i in range(10) for part in block)]
    modules = ["input_blocks.0.0", "out.0", "out.2", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2"]
    modules += [f"middle_block.{k}.{r}" for k in (0, 2) for r in residual] + [f"middle_block.1.{a}" for a in attention]
    levels = len(unet.config.block_out_channels)
    for k in range(3 * levels):
        block = [f"{k}.0.{r}" for r in residual] + [f"{k}.1.{a}" for a in attention]
        modules += [f"output_blocks.{b}" for b in block]
        modules += [f"input_blocks.{k}.0.op"] if k % 3 == 0 else [f"input_blocks.{b}" for b in block]
        if k % 3 == 2:  # the upsampler comes last: third after attention, else second
            modules.append(f"output_blocks.{k}.{2 if unet.config.up_block_types[k // 3].startswith('Cross') else 1}.conv")
    pairs = [(module, part) for module in modules for part in canonical(module, 1)]
    return {f"{m}.{end}": f"{part}.{end}" for m, part in pairs for end in ("weight", "bias") if f"{part}.{end}" in wanted}


def original_layout(policy):
    """A tiny SD1.5-class policy's weights under the names of the original checkpoints."""
    unet = policy.network.state_dict()
    tensors = {f"model.diffusion_model.{a}": unet[b] for a, b in original_unet_names(policy.network).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in original_vae(policy.vae.state_dict()).items()}
    text = policy.pipeline.text_encoder.state_dict()
    tensors |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    return {k: v.contiguous().clone() for k, v in tensors.items()}


def tiny_sd15():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
    unet = {**SD15_UNET, "sample_size": 8, "block_out_channels": [32, 64], "cross_attention_dim": 32, "attention_head_dim": 2}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    configs = {"unet": unet, "vae": {**VAE, "block_out_channels": [32] * 4}, "text_encoder": {**CLIP_L, **sizes}}
    config = MODELS["sd15"][1]
    return replace(config, parts={name: (cls, configs[name]) for name, (cls, _) in config.parts.items()})


def single_file(file, config, **options):
    pipeline = single_file_pipeline(file, UNetPolicy, config, torch.float32, **options)
    return UNetPolicy(pipeline)


def test_a_single_file_is_the_folder_it_was_made_of(tmp_path):
    """Save in the original layout, load: every weight where it was, the same tokens, the same x0 and pixels."""
    import diffusers
    import transformers

    config = tiny_sd15()
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**config.parts["unet"][1])
    vae = diffusers.AutoencoderKL(**config.parts["vae"][1])
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.parts["text_encoder"][1])).eval()
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer(tmp_path / "words"),
        scheduler=diffusers.DDPMScheduler(**config.scheduler[1]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    policy = UNetPolicy(pipeline)
    tensors = original_layout(policy)
    save_file(tensors, tmp_path / "one.safetensors")
    again = single_file(tmp_path / "one.safetensors", config)
    for part in ("unet", "vae", "text_encoder"):
        before, after = (getattr(p.pipeline, part).state_dict() for p in (policy, again))
        assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before), part
    assert torch.equal(outputs(policy), outputs(again))
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(policy.decode(latents), again.decode(latents))
    assert again.prediction_type == "epsilon"
    save_file({**tensors, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert single_file(tmp_path / "v.safetensors", config).prediction_type == "v_prediction"
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    zero = single_file(tmp_path / "z.safetensors", config)
    assert zero.prediction_type == "v_prediction" and float(zero.sigmas(4)[0]) == pytest.approx(4518.76, abs=0.01)
    assert again.levels[-1] == pytest.approx(14.6146, abs=1e-4)
    bare = {k: v for k, v in tensors.items() if k.startswith("model.")}
    save_file(bare, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="holds no vae: name a diffusers folder"):
        single_file(tmp_path / "unet.safetensors", config)
    pipeline.save_pretrained(tmp_path / "folder")
    assert torch.equal(outputs(single_file(tmp_path / "unet.safetensors", config, parts=tmp_path / "folder")), outputs(policy))


def test_a_flux_file_without_t5s_tokenizer_says_what_to_do(tmp_path, family_folder):
    shapes = true_shapes("flux-schnell")
    save_file({k: torch.zeros(s, dtype=torch.uint8) for k, s in shapes.items()}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="holds no vae"):
        load_policy(tmp_path / "flux.safetensors")
    parts = tmp_path / "parts"
    shutil.copytree(family_folder("flux-schnell"), parts)
    shutil.rmtree(parts / "tokenizer_2")
    with pytest.raises(ValueError, match="needs T5's tokenizer"):
        load_policy(tmp_path / "flux.safetensors", parts=parts)


def test_a_tensor_of_a_models_name_with_too_few_dimensions_is_refused():
    with pytest.raises(ValueError, match="too few dimensions"):
        detect({"model.diffusion_model.input_blocks.0.0.weight": ()})
