"""Prompts inside image files, as the common generators write them."""

from __future__ import annotations

import builtins
import gzip
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from trainer.scoring.graph import UnclearPrompt
from trainer.scoring.items import Item
from trainer.scoring.metadata import embedded_prompt
from trainer.scoring.scorer import ScoredImage, _decode

A1111 = "a fox,\nin the snow\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, Size: 4x4"
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "seed": 1}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox"}},
}
FOOOCUS = {
    "prompt": "a fox",
    "negative_prompt": "",
    "base_model": "b",
    "base_model_hash": "0",
    "sampler": "euler",
    "full_prompt": ["a fox", "cinematic"],
}
NOVELAI = {
    "Description": "a fox",
    "Software": "NovelAI",
    "Source": "Diffusion 1A2B",
    "Comment": json.dumps({"sampler": "k_euler", "uc": "ugly", "seed": 1}),
}
CHARACTERS = {
    "sampler": "k_euler",
    "uc": "",
    "v4_prompt": {"caption": {"base_caption": "two animals", "char_captions": [{"char_caption": "a fox"}]}},
}
SD_METADATA = {"image": {"sampler": "k_lms", "prompt": [{"prompt": "a fox [ugly]", "weight": 1.0}]}}
SWARM = {"sui_image_params": {"prompt": "a fox", "negativeprompt": "ugly", "model": "m"}, "sui_extra_data": {"date": "now"}}
DRAW_THINGS = "<exif:UserComment><rdf:Alt><rdf:li>{&quot;c&quot;:&quot;a fox&quot;,&quot;uc&quot;:&quot;&quot;}</rdf:li>"


def png(path, mode="RGB", **texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new(mode, (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        ({"parameters": A1111}, "a fox,\nin the snow"),
        ({"parameters": "a fox\nSteps: 20, Sampler: Euler, Version: f2.0.1-forge"}, "a fox"),
        (
            {"parameters": "a sign: Negative prompt: none\nNegative prompt: ugly\nSteps: 20, Sampler: Euler"},
            "a sign: Negative prompt: none",
        ),
        ({"parameters": "some note"}, None),
        ({"Description": "a photograph of a fox", "Software": "GIMP"}, None),
        ({"prompt": json.dumps(GRAPH)}, "a fox"),
        ({"prompt": json.dumps(GRAPH), "parameters": "a  fox\nSteps: 20, Sampler: Euler"}, "a fox"),
        ({"prompt": "[" * 100_000, "parameters": A1111}, "a fox,\nin the snow"),
        ({"prompt": "not json"}, None),
        ({"prompt": json.dumps({"1": 2})}, None),
        ({"parameters": json.dumps(SWARM)}, "a fox"),
        ({"parameters": json.dumps(FOOOCUS)}, "a fox"),
        (
            {"invokeai_metadata": json.dumps({"positive_prompt": "a fox", "negative_prompt": "ugly", "generation_mode": "flux_txt2img"})},
            "a fox",
        ),
        ({"sd-metadata": json.dumps(SD_METADATA)}, "a fox"),
        ({"Dream": '"a fox [ugly]" -s 20 -S 1 -W 64 -H 64 -C 7.5 -A k_lms'}, "a fox"),
        (NOVELAI, "a fox"),
        ({**NOVELAI, "Description": "two animals", "Comment": json.dumps(CHARACTERS)}, "two animals, a fox"),
        ({"XML:com.adobe.xmp": DRAW_THINGS}, "a fox"),
    ],
)
def test_the_prompt_of_each_generator_is_read_from_png(texts, prompt, tmp_path):
    assert embedded_prompt(png(tmp_path / "a.png", **texts)) == prompt


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"prompt": json.dumps(GRAPH), "parameters": A1111}, "it holds 2 different prompts, such as 'a fox' and 'a fox, in the snow'"),
        ({"workflow": json.dumps({"nodes": []})}, "ComfyUI's workflow without the graph that ran"),
        ({"prompt": json.dumps({"1": {"inputs": {"positive": ["2", 0]}}, "2": {"inputs": {"conditioning": ["2", 0]}}})}, "run in a circle"),
        ({"parameters": json.dumps({"base_model": [], "prompt": []})}, "settings of Fooocus that sd-parsers cannot read"),
        ({"Dream": "odd"}, "settings of InvokeAI that sd-parsers cannot read"),
    ],
)
def test_prompts_that_are_not_certain_are_none_and_stop_no_reward_that_needs_none(texts, reason, tmp_path):
    path = png(tmp_path / "a.png", **texts)
    with pytest.raises(UnclearPrompt, match=f"a.png: .*{reason}"):
        embedded_prompt(path)
    row = _decode(Item(path), True, [])
    assert isinstance(row, ScoredImage) and row.error.endswith(": give --prompt, a manifest, or a.txt beside it")
    assert _decode(Item(path), False, []).prompt == ""


def test_without_sd_parsers_one_sentence_says_what_is_not_read(tmp_path, monkeypatch):
    original = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *rest: (_ for _ in ()).throw(ImportError()) if name == "sd_parsers" else original(name, *rest)
    )
    with pytest.raises(UnclearPrompt, match=r"NovelAI wrote it, and reading that needs sd-parsers: pip install sd-parsers$"):
        embedded_prompt(png(tmp_path / "n.png", **NOVELAI))
    assert embedded_prompt(png(tmp_path / "a.png", parameters=A1111)) == "a fox,\nin the snow"


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-8", "ascii", "none"])
def test_user_comments_are_read_beside_other_tags(suffix, encoding, tmp_path):
    exif = Image.Exif()
    exif[0x010E], exif[0x010F], exif[0x0131] = "A CAMERA'S DESCRIPTION", "Camera", "Software 1.0"
    prefix = {"utf-8": b"UNICODE\0", "ascii": b"ASCII\0\0\0", "none": b"\0" * 8}.get(encoding, b"UNICODE\0")
    exif.get_ifd(0x8769)[0x9286] = prefix + A1111.replace("fox", "füchs" if "utf" in encoding else "fox").encode(
        encoding.replace("none", "ascii")
    )
    Image.new("RGB", (4, 4)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert embedded_prompt(tmp_path / f"a.{suffix}") == ("a füchs,\nin the snow" if "utf" in encoding else "a fox,\nin the snow")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize(
    ("tag", "value"),
    [
        (0x010E, A1111.replace("fox,\nin the snow", "fox")),
        (0x9C9C, A1111.replace("fox,\nin the snow", "fox").encode("utf-16-le") + b"\0\0"),
        (0x0110, "prompt:" + json.dumps(GRAPH)),
        (0x010E, json.dumps(GRAPH)),
    ],
)
def test_descriptions_and_windows_comments_are_read(suffix, tag, value, tmp_path):
    exif = Image.Exif()
    exif[0x0131], exif[tag] = "Software 1.0", value
    Image.new("RGB", (4, 4)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert embedded_prompt(tmp_path / f"a.{suffix}") == "a fox"


def test_settings_of_fooocus_and_swarmui_are_read_from_exif(tmp_path):
    for name, values in (("f", FOOOCUS), ("s", SWARM)):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps(values).encode("utf-16-be")
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg", exif=exif)
        assert embedded_prompt(tmp_path / f"{name}.jpg") == "a fox"


def stealth(path, text, compressed, bits_behind=0):
    """An image with a text in the lowest bits of its alpha channel."""
    data = gzip.compress(text.encode()) if compressed else text.encode()
    data = (b"stealth_pngcomp" if compressed else b"stealth_pnginfo") + (len(data) * 8 + bits_behind).to_bytes(4, "big") + data
    pixels = np.full((64, 96, 4), 255, np.uint8)
    alpha = np.full(64 * 96, 254, np.uint8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    alpha[: len(bits)] |= bits
    pixels[..., 3] = alpha.reshape(96, 64).T
    Image.fromarray(pixels, "RGBA").save(path)
    return path


def test_prompts_in_the_alpha_channel_are_read(tmp_path):
    assert embedded_prompt(stealth(tmp_path / "n.png", json.dumps(NOVELAI), True)) == "a fox"
    assert embedded_prompt(stealth(tmp_path / "a.png", A1111, False)) == "a fox,\nin the snow"
    assert embedded_prompt(stealth(tmp_path / "long.png", json.dumps(NOVELAI), True, 1 << 31)) == "a fox"
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    assert embedded_prompt(tmp_path / "clear.png") is None


def test_text_behind_the_pixels_is_read(tmp_path):
    path = png(tmp_path / "a.png", parameters=A1111)
    data = path.read_bytes()
    start = data.index(b"tEXt") - 4
    end = data.index(b"IDAT") - 4
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert embedded_prompt(path) == "a fox,\nin the snow"
