"""A model in ComfyUI's split files is the diffusers folder that it was made of; what is missing is named before weights are read."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from helpers.original_names import original_anima, original_krea, original_text_encoder, original_vae, original_wan_vae
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.models import load
from trainer.models.comfy_files import _empty, find_part
from trainer.models.configs import T5_XXL
from trainer.models.load import MODELS
from trainer.models.split_files import Given, published_by_name

from .test_split_files import original_klein, original_zimage, prediction

QWEN3 = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""  # what the published template comes to for one message
NETWORKS = {"z-image": original_zimage, "klein": original_klein, "krea2": original_krea, "qwen-image": dict, "anima": original_anima}
FILES = {"z-image": "z_image_bf16", "klein": "flux-2-klein-base-4b", "krea2": "krea2_raw_bf16", "qwen-image": "qwen_image_bf16"}
FILES["anima"] = "anima-base-v1.0"
WAN = ("krea2", "qwen-image", "anima")


@pytest.fixture(params=NETWORKS)
def comfy(request, family_folder, tmp_path, monkeypatch):
    """A folder with ComfyUI's files of a tiny model, the network's file, and a policy over the same weights from a diffusers folder."""
    family = load.resolve(family_folder(request.param))[0]
    policy = family.load(family_folder(request.param), image_size=64)
    pipeline = policy.pipeline
    if request.param in WAN:  # of the true number of blocks, on which the names depend
        torch.manual_seed(0)
        pipeline.vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=2)
    if hasattr(pipeline.tokenizer, "chat_template") and pipeline.tokenizer.chat_template:
        pipeline.tokenizer.chat_template = QWEN3
    policy = family(pipeline, image_size=64)
    name, config = next(iter(family.published.items()))
    settings = {"text_encoder": pipeline.text_encoder.config.to_dict(), "vae": dict(pipeline.vae.config)}
    in_file = [family.network_name, *family.within]
    settings |= {key: dict(getattr(pipeline, key).config) for key in in_file}
    parts = {key: (kind, {k: v for k, v in settings[key].items() if k[0] != "_"}) for key, (kind, _) in config.parts.items()}
    arguments = {key: pipeline.config[key] for key in family.settings}
    config = replace(config, parts=parts, arguments=arguments)
    monkeypatch.setattr(load, "detect", lambda shapes: name)
    monkeypatch.setitem(load.MODELS, name, (family, config))
    monkeypatch.setattr(family, "published", {name: config})
    models = tmp_path / "ComfyUI" / "models"
    vae = original_wan_vae if request.param in WAN else original_vae
    network = NETWORKS[request.param](*(getattr(pipeline, key).state_dict() for key in in_file))
    for file, tensors in (
        (models / "diffusion_models" / f"{FILES[request.param]}.safetensors", network),
        (models / "text_encoders" / config.files["text_encoder"], original_text_encoder(pipeline.text_encoder.state_dict())),
        (models / "vae" / config.files["vae"], vae(pipeline.vae.state_dict())),
    ):
        file.parent.mkdir(parents=True)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)
    for key in ("tokenizer", *family.more_tokenizers):
        folder = "t5_tokenizer" if key == "t5_tokenizer" else "qwen25_tokenizer"
        getattr(pipeline, key).save_pretrained(tmp_path / "ComfyUI" / "comfy" / "text_encoders" / folder)
    return models, models / "diffusion_models" / f"{FILES[request.param]}.safetensors", policy


def same(a, b):
    """Whether predictions, noise levels and images are the same bits."""
    for module in (m for policy in (a, b) for m in policy.pipeline.components.values() if isinstance(m, torch.nn.Module)):
        for weight in module.parameters():
            weight.data = weight.data.clone()  # aligned alike
    latents = torch.randn(1, *a.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [
            torch.equal(prediction(a), prediction(b)),
            torch.equal(a.sigmas(7), b.sigmas(7)),
            torch.equal(a.decode(latents), b.decode(latents)),
        ]


def test_split_files_are_the_folder_they_were_made_of(comfy, tmp_path):
    models, file, policy = comfy
    again = load.load_policy(file, image_size=64)
    assert same(policy, again) == [True, True, True]
    for name in ("text_encoder", "vae"):
        before, after = (getattr(p.pipeline, name).state_dict() for p in (policy, again))
        used = [key for key in before if key != "lm_head.weight"]
        assert all(torch.equal(before[key], after[key]) for key in used), name
    if tokenizer := again.pipeline.tokenizer.chat_template and again.pipeline.tokenizer:
        message, start = [{"role": "user", "content": "a cat"}], "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
        for thinking, expected in ((True, start), (False, start + "<think>\n\n</think>\n\n")):  # Z-Image's and klein's in ComfyUI 0.33
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
            assert tokenizer.apply_chat_template(message, **options) == expected
    moved = {}
    for name, folder in (("text_encoder", "text_encoders"), ("vae", "vae")):
        (source,) = (models / folder).iterdir()
        moved[name] = str(source.rename(tmp_path / f"my {name}.safetensors"))
    assert same(policy, load.load_policy(file, image_size=64, given=Given(**moved))) == [True, True, True]


def test_what_is_missing_is_named_before_weights_are_read(comfy, tmp_path, monkeypatch):
    models, file, _ = comfy
    monkeypatch.setattr("trainer.models.comfy_files.read_scaled", None)
    (encoder,) = (models / "text_encoders").iterdir()
    with pytest.raises(ValueError, match=r"is not the vae of .*: \d+ weights of \w+ differ, .* for example"):
        load.load_policy(file, given=Given(vae=str(encoder)))
    other = load_file(encoder)
    save_file({key: value[:1].clone() for key, value in other.items()}, models / "text_encoders" / "another.safetensors")
    assert find_part(file, "text_encoder", load.MODELS[load.detect({})][1], "", None) == encoder
    hidden = encoder.rename(tmp_path / "x.safetensors")
    with pytest.raises(
        FileNotFoundError, match=rf"needs its text_encoder, in ComfyUI models/text_encoders/{encoder.name}: name it \(text_enc"
    ):
        load.load_policy(file)
    for copy in ("a", "b"):
        save_file(other, models / "text_encoders" / f"{copy}.safetensors")
    with pytest.raises(ValueError, match=r"may use a.safetensors, b.safetensors: name one \(text_encoder = FILE\)"):
        load.load_policy(file)
    for copy in ("a", "b"):
        (models / "text_encoders" / f"{copy}.safetensors").unlink()
    gone = next(key for key in other if "layers.0." in key)
    save_file({key: value for key, value in other.items() if key != gone}, encoder)
    with pytest.raises(ValueError, match=rf"{encoder.name} is not the text_encoder of .*: 1 weights of \w+ differ"):
        load.load_policy(file)
    hidden.rename(encoder)
    (models.parent / "comfy").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"lies in no ComfyUI, which would bring its tokenizer: run `hf download .* --include 'tok"):
        load.load_policy(file)


def test_base_and_turbo_are_told_apart_by_name_or_asked_for(tmp_path):
    for name in ("z-image", "krea2"):
        family, config = MODELS[name]

        def shift(file, schedule="", family=family, config=config):
            found = published_by_name(tmp_path / file, family, config, schedule)
            return found.scheduler[1].get("shift"), found.arguments.get("is_distilled"), found.repository

        base, turbo = shift("x", name), shift("x", f"{name}-turbo")
        assert base != turbo
        assert shift("My-Z-Turbo-v2.safetensors") == turbo and shift("z_image_bf16.safetensors") == base == shift("krea2_RAW.safetensors")
        with pytest.raises(ValueError, match=rf"finetune.safetensors has the shapes of {name} and {name}-turbo: say whose noise levels"):
            shift("finetune.safetensors")
        with pytest.raises(ValueError, match=rf"schedule = 'sdxl': .* may be {name} or {name}-turbo"):
            shift("x", "sdxl")


def test_a_folder_takes_no_files_beside_it(family_folder, capsys):
    with pytest.raises(ValueError, match="vae = 'x' is for a model in split files, as Z-Image's: .* is none"):
        load.load_policy(family_folder("z-image"), given=Given(vae="x"))
    assert main(["sample", "--model", str(family_folder("z-image")), "--text-encoder", "y", "--prompt", "a", "--out", "x"]) == 2
    assert "text_encoder = 'y' is for a model in split files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "theta"), [("z-image", 1e6), ("flux2-klein-9b", 1e6), ("krea2", 5e6), ("qwen-image", 1e6), ("anima", 1e6)]
)
def test_a_text_encoder_turns_its_positions_as_comfyuis_does(name, theta):
    """Rotary frequencies of the published configurations, which no file of weights states, by the constants of ComfyUI 0.33."""
    part, settings = MODELS[name][1].parts["text_encoder"]
    found = [value for key, value in _empty(part, settings).named_buffers() if key.endswith("rotary_emb.inv_freq") and "visual" not in key]
    torch.testing.assert_close(found, [theta ** -(torch.arange(0, 128, 2) / 128)], rtol=1e-5, atol=0)


def test_t5_has_one_embedding(tmp_path):
    from transformers import T5Config, T5EncoderModel

    from trainer.models.comfy_files import load_file_part

    part, settings = MODELS["chroma"][1].parts["text_encoder"][0], {**T5_XXL, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**settings)).eval()
    save_file(original_text_encoder(model.state_dict()), tmp_path / "t5.safetensors")
    again = load_file_part(tmp_path / "t5.safetensors", part, settings, torch.float32)
    ids = torch.tensor([[5, 6, 7, 1]])
    assert torch.equal(model(ids)[0], again(ids)[0])
    assert again.shared.weight is again.encoder.embed_tokens.weight and not any(p.is_meta for p in again.parameters())
