"""No image file ends the reader of prompts in a traceback, whatever its texts, EXIF and bytes are."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from trainer.scoring.graph import UnclearPrompt
from trainer.scoring.metadata import embedded_prompt

A1111 = "a fox,\nin the snow\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, Size: 4x4"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(("1", "2", "a fox", "{a|b}", "")) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                (
                    "1",
                    "2",
                    "class_type",
                    "inputs",
                    "positive",
                    "text",
                    "guider",
                    "select",
                    "input1",
                    "c",
                    "uc",
                    "prompt",
                    "image",
                    "base_model",
                    "sampler",
                )
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
LINK = st.lists(st.sampled_from(("1", "2", "3", "9", 1, 0)), min_size=1, max_size=3)
KINDS = (
    "KSampler",
    "CLIPTextEncode",
    "ConditioningConcat",
    "StringConcatenate",
    "ComfySwitchNode",
    "Any Switch",
    "SaveImage",
    "StringReplace",
    "CaseConverter",
    "",
)
INPUTS = (
    "positive",
    "negative",
    "text",
    "latent_image",
    "images",
    "string_a",
    "string_b",
    "delimiter",
    "switch",
    "on_true",
    "any_1",
    "denoise",
    "find",
    "mode",
    "value",
)
GRAPHS = st.dictionaries(
    st.sampled_from(("1", "2", "3", "4")),
    st.fixed_dictionaries(
        {
            "class_type": st.sampled_from(KINDS),
            "inputs": st.dictionaries(st.sampled_from(INPUTS), LINK | st.text(max_size=4) | st.booleans() | st.floats()),
        }
    ),
)
TEXT = JSON.map(json.dumps) | GRAPHS.map(json.dumps) | st.text(max_size=40) | st.just(A1111)
KEYS = (
    "prompt",
    "parameters",
    "workflow",
    "invokeai_metadata",
    "sd-metadata",
    "Dream",
    "Comment",
    "Description",
    "Software",
    "XML:com.adobe.xmp",
)


@st.composite
def files(draw, folder):
    """An image with odd texts and EXIF, some bytes of which are changed or cut off."""
    suffix = draw(st.sampled_from(("png", "jpg", "webp")))
    path = folder / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x010E] = draw(TEXT).replace("\0", "").encode("utf-8", "replace").decode("latin-1")
    exif.get_ifd(0x8769)[0x9286] = draw(st.sampled_from((b"UNICODE\0", b"ASCII\0\0\0", b""))) + draw(
        TEXT.map(lambda t: t.encode("utf-16-be", "replace")) | st.binary(max_size=30)
    )
    options = {"exif": exif}
    if suffix == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in draw(st.dictionaries(st.sampled_from(KEYS), TEXT, max_size=4)).items():
            options["pnginfo"].add_itxt(key, value.encode("utf-8", "replace").decode(), zip=draw(st.booleans()))
    Image.new(draw(st.sampled_from(("RGB", "RGBA"))) if suffix != "jpg" else "RGB", (4, 4)).save(path, **options)
    data = bytearray(path.read_bytes())
    for at, value in draw(st.lists(st.tuples(st.integers(8, len(data) - 1), st.integers(0, 255)), max_size=3)):
        data[at] = value
    path.write_bytes(data[: draw(st.sampled_from((len(data), len(data), len(data) // 2)))])
    return path


def read_any(folder, number):
    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        path = data.draw(files(folder))
        try:
            found = embedded_prompt(path)
        except UnclearPrompt as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert found is None or found.strip() == found != ""

    check()


@pytest.mark.parametrize("number", [40, pytest.param(500, marks=pytest.mark.full)])
def test_no_image_ends_in_a_traceback(number, tmp_path):
    read_any(tmp_path, number)
