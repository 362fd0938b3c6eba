"""LoRA files of every spelling: fused projections, 1×1 kernels, LoCon, and adapters and families that are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.lora import names
from trainer.lora.file import load_lora, read_adapter
from trainer.lora.foreign import is_text, other_family
from trainer.lora.layouts import parse
from trainer.models.load import MODELS, load_policy
from trainer.models.meta import denoiser_modules


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(stem, down, up, alpha=None):
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": torch.tensor(alpha)}


def convert(capsys, *arguments):
    status = main(["convert", *map(str, arguments)])
    return status, "".join(capsys.readouterr())


FUSED = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "diffusion_model.double_blocks.1.txt_attn.qkv": (24, 8),
    "lora_unet_single_blocks_0_linear1": (56, 8),
    "lora_unet_joint_blocks_0_x_block_attn_qkv": (24, 8),
    "transformer.transformer_blocks.1.attn.to_qkv": (24, 8),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_qkv": (24, 8),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_kv": (16, 8),
}


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("stem", FUSED)
def test_a_fused_projection_is_written_as_its_parts_with_the_same_change(stem, layout, tmp_path, capsys):
    """Stacked row by row the parts are alpha/rank · up·down of the whole."""
    rows, columns = FUSED[stem]
    down, up = random(2, columns), random(rows, 2, seed=1)
    save_file(pair(stem, down, up, 1.0), tmp_path / "in.safetensors")
    unet = any(word in stem for word in ("down_blocks", "mid_block"))
    status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / "out", "--to", layout)
    if layout == "kohya" and not unet:
        assert status == 2 and "use --to diffusers" in said
        return
    assert status == 0 and "every key read back" in said, said
    updates = read_adapter(tmp_path / "out").updates
    parts = sorted(
        updates, key=lambda name: next(i for i, end in enumerate(("_q", "add_q_proj", "_k", "add_k_proj", "_v", "")) if name.endswith(end))
    )
    torch.testing.assert_close(torch.cat([updates[name].scaled_up() @ updates[name].down for name in parts]), 0.5 * up @ down)
    assert len(updates) == {16: 2, 24: 3, 56: 4}[rows]


def test_a_fused_projection_of_another_network_is_refused(tmp_path, capsys):
    """7 widths in FLUX.1, 9 in FLUX.2."""
    save_file(pair("lora_unet_single_blocks_0_linear1", random(2, 8), random(64, 2)), tmp_path / "in.safetensors")
    status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / "out")
    assert status == 2 and "64 rows: q, k, v and the MLP of FLUX.1 are 7 times its 8 columns" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="25 rows of"):
        parse(pair("lora_unet_double_blocks_0_img_attn_qkv", random(2, 8), random(25, 2)))
    qkv = pair("transformer.transformer_blocks.1.attn.to_qkv", random(2, 8), random(24, 2))
    with pytest.raises(ValueError, match=r"adapts transformer_blocks\.1\.attn\.to_q twice"):
        parse({**qkv, **pair("transformer.transformer_blocks.1.attn.to_q", random(2, 8), random(8, 2))})


@pytest.mark.parametrize("model", ["flux2-klein-4b", "z-image"])
def test_original_names_agree_with_diffusers_converter_of_whole_checkpoints(model):
    """Updates as whole weights through diffusers' checkpoint converter, and by our names: the same matrices."""
    from diffusers.loaders import single_file_utils

    if model == "z-image":
        block = {"attention.qkv": (24, 8), "attention.out": (8, 8), "feed_forward.w1": (20, 8), "adaLN_modulation.0": (32, 8)}
        shapes = {f"{place}.1.{n}": shape for place in ("layers", "noise_refiner") for n, shape in block.items()}
        kind = "z_image"
    else:
        double = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.0": (48, 8), "mlp.2": (8, 24)}
        shapes = {f"double_blocks.1.{side}_{n}": shape for side in ("img", "txt") for n, shape in double.items()}
        shapes |= {"single_blocks.3.linear1": (72, 8), "single_blocks.3.linear2": (8, 32), "single_stream_modulation.lin": (24, 8)}
        shapes |= {"double_stream_modulation_img.lin": (48, 8)}
        kind = "flux2"
    tensors, weights = {}, {}
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        down, up = random(2, columns, seed=i), random(rows, 2, seed=50 + i)
        stem = f"diffusion_model.{name}" if i % 2 else "lora_unet_" + name.replace(".", "_")
        tensors |= pair(stem, down, up)
        weights[f"{name}.weight"] = up @ down
    theirs = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")(weights)
    ours = {f"{n}.weight": u.scaled_up() @ u.down for n, u in parse(tensors).updates.items()}
    assert (
        set(ours) == set(theirs) and len(ours) > len(shapes) and {n.removesuffix(".weight") for n in ours} <= set(denoiser_modules(model))
    )
    torch.testing.assert_close(ours, {k: theirs[k] for k in ours})


FOREIGN = {
    "Wan": ["lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_cross_attn_k"],
    "Lumina or another Z-Image": ["lora_unet_layers_0_feed_forward_w1", "lora_unet_cap_embedder_1"],
    "a whole checkpoint's names": ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"],
    "XLabs' names": ["double_blocks.0.processor.qkv_lora1"],
    "ControlNet": ["controlnet.down_blocks.0.attentions.0.proj_in"],
    "HunyuanVideo": ["transformer.double_blocks.0.img_attn_qkv"],
    "another FLUX.2": ["transformer.single_transformer_blocks.47.attn.to_qkv_mlp_proj"],
    "HiDream": ["transformer.double_stream_blocks.0.block.attn1.to_q"],
    "AuraFlow": ["transformer.joint_transformer_blocks.0.attn.to_q"],
    "Stable Cascade": ["lora_prior_unet_down_blocks_0_1_mapper"],
    "AnimateDiff": ["unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"],
    "IP-Adapter": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_ip"],
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_lora_of_another_family_is_refused_by_name_with_the_nearest(family, tmp_path, capsys):
    tensors = {k: v for stem in FOREIGN[family] for k, v in pair(stem, random(2, 8), random(8, 2)).items()}
    save_file(tensors, tmp_path / "in.safetensors")
    status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert status == 2 and family in said and "nearest" in said and said.count("\n") == 1 and not (tmp_path / "out.safetensors").exists()


def test_names_that_no_known_model_has_are_refused_with_the_nearest(tmp_path, capsys):
    """Qwen-Image, whose attention is called as FLUX's, has the most blocks: 60."""
    for block in (0, 60):
        tensors = pair(f"transformer.transformer_blocks.{block}.attn.add_q_proj", random(2, 8), random(8, 2))
        save_file(
            tensors | pair("transformer.transformer_blocks.1.attn.to_q", random(2, 8), random(8, 2)), tmp_path / f"{block}.safetensors"
        )
    assert convert(capsys, tmp_path / "0.safetensors", tmp_path / "out.safetensors")[0] == 0
    status, said = convert(capsys, tmp_path / "60.safetensors", tmp_path / "no.safetensors")
    assert status == 2 and "lacks 1 of its 2 modules, first transformer_blocks.60.attn.add_q_proj" in said and "nearest is " in said


@pytest.mark.parametrize("model", MODELS)
def test_no_module_of_a_known_model_is_taken_for_another_familys(model):
    modules = denoiser_modules(model)
    spelled = [names.stem(name, layout) for name in modules for layout in ("kohya", "diffusers", "peft")]
    spelled += ["lora_transformer_" + name.replace(".", "_") for name in modules]
    assert len(modules) > 100 and not any(map(is_text, spelled))
    assert [names.plain(key) for key in spelled[-len(modules) :]] == list(modules)
    assert other_family(spelled) == "" or model.startswith(("z-image", "flux2")), "they share module names with others; shapes decide"


def test_animas_original_names_are_those_that_diffusers_reads_in_every_spelling():
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers

    modules = denoiser_modules("anima")
    stems = {names.stem(name, "original"): name for name in modules}
    theirs = _convert_non_diffusers_anima_lora_to_diffusers({f"{stem}.lora_A.weight": stem for stem in stems})
    assert {stem: key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key, stem in theirs.items()} == stems
    kohya = ["lora_unet_" + stem.removeprefix("diffusion_model.").replace(".", "_") for stem in stems]
    for stem, name in zip([*stems, *kohya], [*modules, *modules]):
        assert names.canonical(names.plain(stem), 8, 8) == {name: slice(None)}
    assert len(stems) == 28 * 16 + 6 and not any(map(is_text, stems)) and other_family([*stems, *kohya]) == ""


def test_an_anima_lora_of_kohya_is_written_by_the_names_that_both_hosts_load(tmp_path, capsys):
    """ComfyUI knows no diffusers' names for Anima, and diffusers' loader no kohya's."""
    from diffusers import AnimaModularPipeline

    down, up = random(2, 2048), random(2048, 2, seed=1)
    save_file(pair("lora_unet_blocks_0_self_attn_q_proj", down, up, 1.0), tmp_path / "in.safetensors")
    status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "diffusers")
    assert status == 0 and "of anima" in said, said
    written = load_file(tmp_path / "out.safetensors")
    stem = "diffusion_model.blocks.0.self_attn.q_proj"
    assert set(written) == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"} and torch.equal(written[f"{stem}.lora_B.weight"], 0.5 * up)
    theirs = AnimaModularPipeline.lora_state_dict(written)
    assert set(theirs) == {f"transformer.transformer_blocks.0.attn1.to_q.lora_{half}.weight" for half in "AB"}


def test_a_lora_of_animas_text_conditioner_is_refused_with_the_way_out(family_folder, tmp_path):
    inside, conditioner = "diffusion_model.blocks.0.self_attn.q_proj", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj"
    save_file({**pair(inside, random(2, 32), random(32, 2)), **pair(conditioner, random(2, 32), random(32, 2))}, tmp_path / "a.safetensors")
    policy = load_policy(family_folder("anima"), image_size=64)
    with pytest.raises(
        ValueError, match=r"also adapts text encoders \(1 modules, first diffusion_model.llm_adapter.*--without-text-encoders"
    ):
        load_lora(policy, tmp_path / "a.safetensors")


def test_text_encoders_are_known_under_every_name():
    ends = ("text_model.encoder.layers.0.mlp.fc1", "text_model_encoder_layers_0_mlp_fc1")
    starts = ("clip_l.transformer.", "text_encoder.", "text_encoder_2.", "text_encoders.clip_g.transformer.", "base_model.model.", "")
    stems = (
        [f"lora_te{n}_{ends[1]}" for n in ("", 1, 2)]
        + [start + ends[0] for start in starts]
        + ["lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    )
    assert [stem for stem in stems if not is_text(stem)] == []


MODULE = "lora_unet_mid_block_attentions_0_proj_in"
OTHERS = {
    "LoHa": {f"{MODULE}.hada_{end}": random(8, 8) for end in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {f"{MODULE}.lokr_w1": random(2, 2), f"{MODULE}.lokr_w2_a": random(4, 2), f"{MODULE}.lokr_w2_b": random(2, 4)},
    "DoRA": {**pair(MODULE, random(2, 8), random(8, 2)), f"{MODULE}.dora_scale": random(8, 1)},
    "IA3": {f"{MODULE}.weight": random(8), f"{MODULE}.on_input": torch.tensor(True)},
    "OFT": {f"{MODULE}.oft_blocks": random(2, 4, 4)},
    "GLoRA": {f"{MODULE}.{end}.weight": random(8, 8) for end in ("a1", "a2", "b1", "b2")},
    "weight differences": {**pair(MODULE, random(2, 8), random(8, 2)), f"{MODULE}.diff_b": random(8)},
    "biases": {**pair(MODULE, random(2, 8), random(8, 2)), f"{MODULE}.lora_up.bias": random(8)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_that_are_more_than_lora_are_refused_by_name(kind, tmp_path, capsys):
    save_file(OTHERS[kind] | {f"{MODULE}.alpha": torch.tensor(1.0)}, tmp_path / "in.safetensors")
    status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert status == 2 and f"holds more than plain LoRA: {kind}" in said and MODULE in said and said.count("\n") == 1


def test_what_is_not_a_number_is_refused_with_its_tensor(tmp_path):
    good = pair(MODULE, random(2, 8), random(8, 2))
    for value, message in ((random(8, 2) / 0, "values that are not finite"), (torch.zeros(8, 2, dtype=torch.uint8), "is quantised")):
        with pytest.raises(ValueError, match=message):
            parse(good | {f"{MODULE}.lora_up.weight": value})
    key = f"{MODULE}.lora_up.weight"
    torch.testing.assert_close(
        parse(good | {key: good[key].to(torch.float8_e4m3fn)}).updates["mid_block.attentions.0.proj_in"].up.shape, (8, 2)
    )


def test_locons_kernel_between_two_1x1_halves_is_folded_into_down():
    """Against the convolutions themselves: up∘mid∘down on an image, alpha over the kernel's rank."""
    down, mid, up = random(3, 5, 1, 1), random(4, 3, 3, 3, seed=1), random(6, 4, 1, 1, seed=2)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    (update,) = parse(pair(stem, down, up, 2.0) | {f"{stem}.lora_mid.weight": mid}).updates.values()
    x = random(1, 5, 7, 7, seed=3)
    conv = torch.nn.functional.conv2d
    expected = 2.0 / 4 * conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(conv(x, update.down, padding=1), update.scaled_up()), expected, rtol=1e-4, atol=1e-4)


def x0(policy):
    x = random(1, *policy.latent_shape)
    with torch.no_grad():
        return policy.denoiser(["a red star"])(x, torch.tensor([0.7]))


def test_1x1_kernels_and_matrices_are_one_thing(family_folder, tmp_path):
    """A file of either kind for linear layers and for 1×1 convolutions, and for 3×3 ones flattened: equal x0."""
    modules = load_policy(family_folder("sd15")).adapters.adaptable()
    chosen = {n: m.weight.shape for n, m in modules.items() if n.endswith(("to_q", "proj_in", "conv1", "conv_shortcut"))}
    assert {tuple(shape[2:]) for shape in chosen.values()} == {(), (1, 1), (3, 3)}
    flat, kernels = {}, {}
    for i, (name, shape) in enumerate(chosen.items()):
        stem, down, up = names.stem(name, "kohya"), 0.1 * random(2, shape[1:].numel(), seed=i), 0.1 * random(shape[0], 2, seed=99 + i)
        flat |= pair(stem, down, up)
        kernel = shape[2:] if len(shape) == 4 else (1, 1)
        kernels |= pair(stem, down.reshape(2, shape[1], *kernel), up[:, :, None, None])
    results = []
    for name, tensors in (("flat", flat), ("kernels", kernels)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        policy = load_policy(family_folder("sd15"))
        base = x0(policy)
        load_lora(policy, tmp_path / f"{name}.safetensors")
        results.append(x0(policy))
    assert torch.equal(*results) and float((results[0] - base).abs().max()) > 1e-3


def test_a_sd2_file_of_kernels_is_written_as_diffusers_own_loader_takes_it(tmp_path, capsys):
    """kohya's 1×1 kernels of SD2, whose proj_in is linear; SD1.5's is a convolution."""
    for model in ("sd15", "sd21"):
        shapes = {
            n: s
            for n, s in denoiser_modules(model).items()
            if n.startswith("mid_block.attentions") and ("attn2.to_k" in n or "proj_in" in n)
        }
        tensors = {}
        for name, shape in shapes.items():
            tensors |= pair(names.stem(name, "kohya"), random(2, shape[1], 1, 1), random(shape[0], 2, 1, 1))
        save_file(tensors, tmp_path / "in.safetensors")
        status, said = convert(capsys, tmp_path / "in.safetensors", tmp_path / f"{model}.safetensors", "--to", "diffusers")
        assert status == 0 and f"modules of {model})" in said
        written = load_file(tmp_path / f"{model}.safetensors")
        ranks = {key.split(".")[4]: value.ndim for key, value in written.items()}
        assert ranks == {"proj_in": 4 if model == "sd15" else 2, "transformer_blocks": 2}


@pytest.mark.parametrize("family", ["sd15", "flux-dev"])
def test_diffusers_own_loader_predicts_the_same_from_a_converted_file(family, family_folder, tmp_path, capsys):
    """From names that diffusers' loader and ours read, over ours: fused (FLUX) and 4-D (UNet) originals, equal x0."""
    modules = load_policy(family_folder(family), image_size=64).adapters.adaptable()
    tensors = {}
    if family == "sd15":
        for i, (name, module) in enumerate((n, m) for n, m in modules.items() if n.endswith(("to_q", "proj_in"))):
            shape = module.weight.shape
            tensors |= pair(
                names.stem(name, "kohya"),
                0.2 * random(1 + i % 3, shape[1], 1, 1, seed=i),
                random(shape[0], 1 + i % 3, 1, 1, seed=9 + i),
                0.5,
            )
    else:
        width = modules["transformer_blocks.0.attn.to_q"].weight.shape[0]
        for i, (name, rows) in enumerate(
            (("double_blocks_0_img_attn_qkv", 3), ("double_blocks_1_txt_attn_qkv", 3), ("single_blocks_0_linear1", 7))
        ):
            tensors |= pair(f"lora_unet_{name}", 0.2 * random(2 + i, width, seed=i), random(rows * width, 2 + i, seed=9 + i), 0.5)
    save_file(tensors, tmp_path / "in.safetensors")
    assert (
        convert(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "diffusers", "--model", family_folder(family))[0]
        == 0
    )
    ours, theirs = load_policy(family_folder(family), image_size=64), load_policy(family_folder(family), image_size=64)
    base = x0(ours)
    load_lora(ours, tmp_path / "in.safetensors")
    theirs.pipeline.load_lora_weights(tmp_path, weight_name="out.safetensors")
    assert float((x0(ours) - base).abs().max()) > 1e-3
    torch.testing.assert_close(x0(theirs), x0(ours), rtol=1e-4, atol=1e-5)


PEFT = "base_model.model.mid_block.attentions.0.proj_in"


def peft_folder(folder, **settings):
    folder.mkdir()
    save_file({f"{PEFT}.lora_A.weight": random(4, 8), f"{PEFT}.lora_B.weight": random(8, 4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
    return folder


def test_an_alpha_of_zero_is_zero(tmp_path):
    (update,) = read_adapter(peft_folder(tmp_path / "zero", lora_alpha=0)).updates.values()
    assert float(update.scaled_up().abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": float("nan")}, "alpha nan .* in adapter_config.json: expected a finite number"),
        ({"lora_alpha": "x"}, "alpha 'x' .* in adapter_config.json"),
        ({"alpha_pattern": [1]}, "alpha_pattern in adapter_config.json which is not a table"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base model"),
    ],
)
def test_what_peft_says_of_an_adapter_is_taken_or_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_adapter(peft_folder(tmp_path / "bad", **settings))


def test_halves_that_come_twice_or_have_no_rows_are_refused(tmp_path):
    stem = "unet.mid_block.attentions.0.proj_in"
    twice = {f"{stem}.lora_A.weight": random(2, 8), f"{stem}.lora_B.weight": random(8, 2), **pair(stem, random(2, 8), random(8, 2))}
    with pytest.raises(ValueError, match="holds down of .* twice"):
        parse(twice)
    with pytest.raises(ValueError, match="has halves of shapes"):
        parse(pair(stem, random(2, 8), torch.zeros(0, 2)))
