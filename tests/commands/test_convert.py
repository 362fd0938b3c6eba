"""LoRA layouts: one function under every name, diffusers' readers as the judge of foreign names, and fine-tunes as LoRAs."""

from __future__ import annotations

import json
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.lora import names as lora_names
from trainer.lora.extract import extract_delta, low_rank
from trainer.lora.file import load_lora, read_adapter, save_lora
from trainer.lora.layouts import parse
from trainer.models.flux import FLUX_DEV
from trainer.models.load import load_policy
from trainer.models.sd3 import SD35_LARGE, SD35_MEDIUM
from trainer.models.sdxl import SDXL_UNET
from trainer.models.unet import SD15_UNET, SD21_UNET
from trainer.policy import Lora

PROMPTS = ["a red star", "a blue ring, blurred"]


def outputs(policy):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS)(x, torch.tensor([0.8, 0.4]))


def tuned_file(policy, path, **settings):
    policy.add_lora(Lora(rank=4, alpha=6.0, **settings))
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    save_lora(policy, path, {"switch_sigma": 0.5})
    return path


def error_of(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("family", "layouts"), [("sd15", ("diffusers", "peft", "kohya")), ("sd3", ("peft", "diffusers"))])
def test_every_layout_is_the_same_function(family_folder, tmp_path, family, layouts, capsys):
    policy = load_policy(family_folder(family), image_size=64)
    base, here = outputs(policy), tuned_file(policy, tmp_path / "start.safetensors", targets=("to_q", "to_out.0", "norm1.linear"))
    tuned = outputs(policy)
    assert float((tuned - base).abs().max()) > 1e-3
    for layout in layouts:
        there = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        assert main(["convert", str(here), str(there), "--to", layout]) == 0
        assert "every key read back" in capsys.readouterr().out
        again = load_policy(family_folder(family), image_size=64)
        metadata = load_lora(again, there)
        torch.testing.assert_close(outputs(again), tuned, rtol=1e-5, atol=1e-5)
        assert metadata == {"switch_sigma": 0.5}
        here = there


def test_peft_itself_loads_a_peft_folder(family_folder, tmp_path):
    from peft import PeftModel

    policy = load_policy(family_folder("sd15"))
    file = tuned_file(policy, tmp_path / "a.safetensors")
    adapter, theirs = read_adapter(file), load_policy(family_folder("sd15"))
    first = next(iter(adapter.updates))
    mixed = {k: v for k, v in load_file(file).items() if "alpha" not in k or first.replace(".", "_") not in k}  # one alpha is the rank
    save_file(mixed, file)
    assert main(["convert", str(file), str(tmp_path / "p"), "--to", "peft"]) == 0
    ours = load_policy(family_folder("sd15"))
    load_lora(ours, file)
    PeftModel.from_pretrained(theirs.network, tmp_path / "p")
    assert not torch.allclose(outputs(ours), outputs(policy), atol=1e-6)
    torch.testing.assert_close(outputs(theirs), outputs(ours), rtol=1e-5, atol=1e-5)


def test_ranks_and_alphas_may_differ_from_module_to_module(family_folder, tmp_path):
    """Against the weights themselves with (alpha/rank)·up·down added by hand, a 3×3 convolution included."""
    policy, merged = load_policy(family_folder("sd15")), load_policy(family_folder("sd15"))
    modules = policy.adapters.adaptable()
    names = [n for n in modules if n.endswith(("to_q", "conv1"))]
    tensors, rng = {}, torch.Generator().manual_seed(1)
    for i, name in enumerate(names):
        weight, rank, alpha = modules[name].weight, 1 + i % 3, float(2 + i % 2)
        down = 0.1 * torch.randn(rank, *weight.shape[1:], generator=rng)
        up = 0.1 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=rng)
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
        with torch.no_grad():
            merged.adapters.adaptable()[name].weight += (alpha / rank) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(tensors, tmp_path / "mixed.safetensors")
    base = outputs(policy)
    load_lora(policy, tmp_path / "mixed.safetensors")
    assert float((outputs(policy) - base).abs().max()) > 1e-3
    torch.testing.assert_close(outputs(policy), outputs(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET, SDXL_UNET])
def test_kohyas_spelling_of_every_true_unet_module_is_undone(config):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    names = [n for n, m in unet.named_modules() if hasattr(m, "weight")]
    assert len(names) > 300
    assert [lora_names.plain(lora_names.stem(n, "kohya")) for n in names] == names


@pytest.mark.parametrize(
    ("kind", "config"), [("SD3", SD35_MEDIUM), ("SD3", SD35_LARGE), ("Flux", FLUX_DEV)], ids=["sd35-medium", "sd35-large", "flux"]
)
def test_onetrainers_spelling_of_every_true_transformer_module_is_undone(kind, config):
    with torch.device("meta"):
        network = getattr(diffusers, f"{kind}Transformer2DModel")(**config)
    names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(names) > 300
    assert [lora_names.plain("lora_transformer_" + n.replace(".", "_")) for n in names] == names


def updates_by_diffusers(state, alphas):
    """The first 8 columns of (alpha/rank)·up·down by module, as diffusers' own reader gives it."""
    found = {}
    for key, up in state.items():
        match = re.fullmatch(r"(?:unet|transformer)\.(.*?)(?:\.lora_B|[._]lora\.up)\.weight", key)
        if match:
            down = state[key.replace("lora_B", "lora_A").replace("lora.up.", "lora.down.")]
            alpha = next((v for k, v in (alphas or {}).items() if match[1] in k), len(down))
            name = match[1].replace(".processor.", ".")  # as it named attention before peft
            found[name + ".0" if name.endswith(".to_out") else name] = float(alpha) / len(down) * (up.flatten(1) @ down.flatten(1)[:, :8])
    return found


def test_sdxl_files_with_original_block_numbers_are_read_as_diffusers_reads_them():
    names = ["input_blocks_4_1_transformer_blocks_1_attn1_to_q", "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"]
    names += ["middle_block_1_transformer_blocks_0_attn2_to_out_0", "output_blocks_2_1_proj_in"]
    names += ["output_blocks_5_1_transformer_blocks_0_attn2_to_k"]
    rng, tensors = torch.Generator().manual_seed(0), {}
    for i, name in enumerate(names):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2 + i, 8, generator=rng)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(6, 2 + i, generator=rng)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0 + i)
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel(**SDXL_UNET).config
    theirs = updates_by_diffusers(*diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=config))
    ours = parse(tensors)
    assert ours.root == "unet" and set(ours.updates) == set(theirs) and len(theirs) == len(names)
    for name, update in ours.updates.items():
        torch.testing.assert_close(update.scaled_up() @ update.down[:, :8], theirs[name])


def test_fused_flux_files_are_read_as_diffusers_reads_them():
    shapes = {
        "double_blocks_0_img_attn_qkv": (24, 8),
        "double_blocks_0_txt_attn_qkv": (24, 8),
        "double_blocks_0_img_attn_proj": (8, 8),
        "double_blocks_0_txt_attn_proj": (8, 8),
        "double_blocks_0_img_mlp_0": (32, 8),
        "double_blocks_0_txt_mlp_2": (8, 32),
        "double_blocks_0_img_mod_lin": (48, 8),
        "single_blocks_0_linear1": (3 * 3072 + 12288, 3072),  # diffusers' reader knows this width by heart
        "single_blocks_0_linear2": (8, 40),
        "single_blocks_0_modulation_lin": (24, 8),
    }
    rng, tensors = torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, columns, generator=rng)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 2, generator=rng)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    theirs = updates_by_diffusers(diffusers.FluxPipeline.lora_state_dict(dict(tensors)), {})
    ours = parse(tensors)
    assert ours.root == "transformer" and set(ours.updates) == set(theirs) and len(theirs) == 17
    for name, update in ours.updates.items():
        torch.testing.assert_close(update.scaled_up() @ update.down[:, :8], theirs[name])


def stream_modules(kind):
    """Every module of a published transformer of one block of each kind by its original name, as (rows, columns), width 8."""
    if kind == "flux":
        double = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.0": (32, 8), "mlp.2": (8, 32), "mod.lin": (48, 8)}
        modules = {f"double_blocks.0.{side}_{n}": shape for side in ("img", "txt") for n, shape in double.items()}
        # diffusers' converter knows this width by heart
        single = {"linear1": (3 * 3072 + 12288, 3072), "linear2": (8, 40), "modulation.lin": (24, 8)}
        modules |= {f"single_blocks.0.{n}": shape for n, shape in single.items()}
        ends = {"img_in": (8, 64), "txt_in": (8, 16), "final_layer.linear": (64, 8), "final_layer.adaLN_modulation.1": (16, 8)}
        return modules | ends | {f"{n}_in.{s}_layer": (8, 8) for n in ("time", "vector", "guidance") for s in ("in", "out")}
    block = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (32, 8), "mlp.fc2": (8, 32), "adaLN_modulation.1": (48, 8)}
    modules = {f"joint_blocks.{i}.{side}_block.{n}": shape for i in (0, 1) for side in ("x", "context") for n, shape in block.items()}
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        del modules[f"joint_blocks.1.context_block.{name}"]  # the last block drops the text
    modules["joint_blocks.1.context_block.adaLN_modulation.1"] = (16, 8)
    ends = {"context_embedder": (8, 16), "final_layer.linear": (64, 8), "final_layer.adaLN_modulation.1": (16, 8)}
    return modules | ends | {f"{n}_embedder.mlp.{j}": (8, 8) for n in ("t", "y") for j in (0, 2)}


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_original_names_of_whole_transformers_agree_with_diffusers_converter(kind):
    """Updates as whole weights through diffusers' checkpoint converter, and by our names: the same matrices."""
    from diffusers.loaders import single_file_utils

    rng, tensors, weights = torch.Generator().manual_seed(0), {}, {}
    for name, (rows, columns) in stream_modules(kind).items():
        down, up = torch.randn(2, columns, generator=rng), torch.randn(rows, 2, generator=rng)
        tensors |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
        weights |= {f"{name}.weight": up @ down[:, :8], f"{name}.bias": torch.zeros(rows)}
    zero = torch.zeros(1)
    if kind == "flux":
        for norm in ("query_norm", "key_norm"):
            weights |= {f"double_blocks.0.{side}_attn.norm.{norm}.scale": zero for side in ("img", "txt")}
            weights[f"single_blocks.0.norm.{norm}.scale"] = zero
        converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(weights)
    else:
        weights |= {"pos_embed": zero, "x_embedder.proj.weight": torch.zeros(8, 1, 1, 1), "x_embedder.proj.bias": zero}
        converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    theirs = {k.removesuffix(".weight"): v for k, v in converted.items() if k.endswith(".weight") and v.ndim == 2}
    ours = parse(tensors)
    assert set(ours.updates) == set(theirs) and len(theirs) > 25
    for name, update in ours.updates.items():
        torch.testing.assert_close(update.scaled_up() @ update.down[:, :8], theirs[name])


def test_what_is_no_plain_lora_of_this_model_is_refused_with_one_line(family_folder, tmp_path, capsys):
    file, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    down, up = {"lora_unet_mid_block_x.lora_down.weight": torch.zeros(2, 4)}, {"lora_unet_mid_block_x.lora_up.weight": torch.zeros(4, 2)}
    cases = [
        ({"a.weight": torch.zeros(1)}, "holds no LoRA: first key a.weight"),
        ({**down, **up, "lora_unet_mid_block_x.dora_scale": torch.zeros(1)}, "holds more than plain LoRA"),
        (down, "is incomplete: lora_unet_mid_block_x has down without its other half"),
        ({**down, "lora_unet_mid_block_x.lora_up.weight": torch.zeros(4, 3)}, "is incomplete: lora_unet_mid_block_x has halves of shapes"),
        ({**down, **up, "lora_unet_y.alpha": torch.tensor(1.0)}, "1 modules have an alpha alone, first lora_unet_y"),
        ({k: v[:0] if k in down else v[:, :0] for k, v in {**down, **up}.items()}, "has halves of shapes (0, 4) and (4, 0)"),
        ({k: v.flatten() for k, v in {**down, **up}.items()}, "has halves of shapes (8,) and (8,)"),
        ({**down, **{k: v / 0 for k, v in up.items()}}, "is damaged: lora_unet_mid_block_x has values that are not finite"),
        ({**down, **up, "lora_unet_mid_block_x.alpha": torch.ones(2)}, "lora_unet_mid_block_x.alpha is not one finite number"),
        ({**down, **up, "lora_unet_mid_block_x.alpha": torch.tensor(float("nan"))}, "alpha is not one finite number"),
        ({k.replace("mid_block_x", "input_blocks"): v for k, v in {**down, **up}.items()}, "adapts lora_unet_input_blocks, which no known"),
    ]
    for tensors, message in cases:
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        error = error_of(capsys, "convert", file, out)
        assert message in error and error.count("\n") == 1 and not out.exists()
    for key, value in {"imagerefl": "{", "lora_adapter_metadata": "[]"}.items():
        save_file({**down, **up}, file, {key: value})
        error = error_of(capsys, "convert", file, out)
        assert f"{file}, metadata `{key}` is not " in error and error.count("\n") == 1 and not out.exists()
    save_file({**down, **up}, file)
    file.write_bytes(file.read_bytes()[:-20])
    assert "is not a readable safetensors file" in error_of(capsys, "convert", file, out)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)}
    text |= {k.replace("down", "up"): torch.zeros(4, 2) for k in text}
    save_file({**down, **up, **text}, file)
    with pytest.raises(ValueError, match=r"also adapts text encoders \(1 modules, first lora_te_text_model_encoder_layers_0_mlp_fc1\)"):
        load_lora(load_policy(family_folder("sd15")), file)
    assert "add --without-text-encoders to leave them out" in error_of(capsys, "convert", file, out)
    assert "nearest is sd15, which lacks 1 of its 1 modules" in error_of(capsys, "convert", file, out, "--without-text-encoders")
    save_file({k.replace("block_x", "block_resnets_0_conv1"): v for k, v in {**down, **up, **text}.items()}, file)
    assert main(["convert", str(file), str(out), "--without-text-encoders"]) == 0 and "left out: 1 modules" in capsys.readouterr().out
    assert len(load_file(out)) == 3
    assert "exists: add --overwrite" in error_of(capsys, "convert", file, out)
    flux = load_policy(family_folder("flux-dev"), image_size=64)
    with pytest.raises(ValueError, match="was made for another model: 1 of 1 modules unknown"):
        load_lora(flux, out)
    assert flux.lora is None
    tuned_file(flux, tmp_path / "flux.safetensors")
    assert "use --to diffusers" in error_of(capsys, "convert", tmp_path / "flux.safetensors", tmp_path / "k.safetensors", "--to", "kohya")
    assert "give the LoRA to read" in error_of(capsys, "convert", out)
    assert "extraction takes" in error_of(capsys, "convert", out, "--base", file)


def test_the_nearest_matrix_of_a_rank_holds_its_singular_values():
    change = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = low_rank(change, 4, exact=True)
    values = torch.linalg.svdvals(change.flatten(1))
    assert update.down.shape == (4, 3, 3, 3) and update.up.shape == (12, 4, 1, 1)
    rest = change.flatten(1) - update.up.flatten(1).double() @ update.down.flatten(1).double()
    torch.testing.assert_close(rest.square().sum(), values[4:].square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_randomised_decomposition_is_near_the_best(decay):
    """Error ‖ΔW − BA‖ against that of the singular values left out, for spectra that fall as i^-decay."""
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=rng, dtype=torch.float64))[0] for n in (300, 500))
    values = torch.arange(1, 301, dtype=torch.float64) ** -decay
    change, found = (u * values) @ v.T, []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(low_rank(change, 32))
    best = values[32:].norm()
    error = (change - found[0].up.double() @ found[0].down.double()).norm()
    assert 1 - 1e-6 < error / best < 1.002 and found[0].rank == 32
    assert torch.equal(found[0].up, found[1].up) and torch.equal(found[0].down, found[1].down)


def test_a_low_rank_fine_tune_is_recovered_from_its_weights(family_folder, tmp_path, capsys):
    base, tuned = load_policy(family_folder("sd15")), load_policy(family_folder("sd15"))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, module in tuned.adapters.adaptable().items():
            if name.endswith(("to_k", "conv2")):
                weight = module.weight
                factors = torch.randn(len(weight), 2, generator=rng), torch.randn(2, weight[0].numel(), generator=rng)
                weight += 0.02 * (factors[0] @ factors[1]).reshape(weight.shape)
    tuned.pipeline.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "extracted.safetensors"
    arguments = ["convert", str(out), "--base", str(family_folder("sd15")), "--tuned", str(tmp_path / "tuned" / "unet"), "--rank"]
    assert main([*arguments, "2"]) == 0
    assert "holds 100.0% of the change's energy" in capsys.readouterr().out
    load_lora(base, out)
    torch.testing.assert_close(outputs(base), outputs(tuned), rtol=1e-4, atol=1e-4)
    assert main([*arguments, "1", "--overwrite"]) == 0
    held = json.loads(read_header(out)["imagerefl"])["extracted"]["retained"]
    assert 0.3 < held < 0.99
    assert "nothing to extract" in error_of(capsys, *arguments[:4], "--tuned", family_folder("sd15"), "--overwrite")
    assert "differ in" in error_of(capsys, *arguments[:4], "--tuned", family_folder("sdxl"), "--overwrite")


def test_a_change_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="the change of mid_block.x.weight is not finite: one of the models is damaged"):
        extract_delta({"lora_unet_mid_block_x.diff": torch.full((4, 4), float("inf"))}, rank=2)


def read_header(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()
