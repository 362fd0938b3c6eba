"""Safetensors files of any header: every reader of weights takes them, or refuses them with one line that names the file."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer.__main__ import main
from trainer.lora.extract import extract, weight_files
from trainer.lora.file import read_adapter, read_lora, read_metadata
from trainer.models.load import resolve
from trainer.models.quantised import read_scaled
from trainer.models.single_file import tensor_shapes
from trainer.rewards.weights import read_state

NAMES = st.one_of(
    st.sampled_from(
        [
            *("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"),
            *(
                "lora_unet_x.alpha",
                "lora_unet_conv_in.diff",
                "lora_unet_conv_in.lokr_w1",
                "transformer.double_blocks.0.img_attn.qkv.lora_A.weight",
            ),
            *(
                "lora_unet_input_blocks_1.lora_up.weight",
                "lora_unet_single_blocks_0_linear1.lora_down.weight",
                "diffusion_model..lora_up.weight",
            ),
            *(
                "model.diffusion_model.input_blocks.0.0.weight",
                "a.weight",
                "a.scale_weight",
                "a.comfy_quant",
                "a.weight_scale_2",
                "scaled_fp8",
                "",
            ),
        ]
    ),
    st.text(max_size=12),
)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "F99", "", "C64"])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(DTYPES, st.integers(), st.none()),
        "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=5), st.none(), st.just([2**62, 2**62])),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 64), max_size=3), st.none()),
    }
)
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["{", "[]", "null", '{"step": 1}', '{"layers": 3}', '{"layers": {"a": {}}}', "{}"]))
METADATA = st.dictionaries(st.sampled_from(["imagerefl", "lora_adapter_metadata", "_quantization_metadata", "format"]), TEXTS, max_size=3)


@st.composite
def files(draw):
    """Bytes of a file: right by its header, of any header, or of any bytes."""
    kind = draw(st.sampled_from(["right", "right", "header", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    header, size = {}, 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        if kind == "header":
            header[name] = draw(ENTRY)
            continue
        dtype, shape = draw(st.sampled_from(["F32", "U8", "F8_E4M3", "BF16"])), draw(st.lists(st.integers(0, 3), max_size=4))
        length = {"F32": 4, "U8": 1, "F8_E4M3": 1, "BF16": 2}[dtype]
        for side in shape:
            length *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    if draw(st.booleans()):
        header["__metadata__"] = draw(METADATA)
    text = json.dumps(header).encode()
    data = draw(st.binary(min_size=size, max_size=size)) if kind == "right" else draw(st.binary(max_size=64))
    whole = struct.pack("<Q", draw(st.sampled_from([len(text)] * 6 + [0, 2**40]))) + text + data
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 5)) == 0 else whole


READERS = {
    "read_lora": read_lora,
    "read_metadata": read_metadata,
    "read_adapter": read_adapter,
    "tensor_shapes": tensor_shapes,
    "read_scaled": lambda path: read_scaled(path, torch.float32),
    "resolve": resolve,
    "read_state": read_state,
    "extract": lambda path: extract(*[weight_files(path)[0]] * 2, rank=1),
}


def check(folder, content):
    path = folder / "a.safetensors"
    path.write_bytes(content)
    for name, reader in READERS.items():
        try:
            reader(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), (name, str(error))
            assert name == "extract" or str(path) in str(error), (name, str(error))
    out = folder / "out.safetensors"
    assert main(["convert", str(path), str(out), "--overwrite"]) in (0, 2)


def fuzz(number):
    """`number` files; the seed is fixed."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


@fuzz(40)
@given(files())
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2**63) + b"{}")
def test_any_file_is_read_or_refused_with_one_line(tmp_path, content):
    check(tmp_path, content)


@pytest.mark.full
@fuzz(500)
@given(files())
def test_any_of_500_files_is_read_or_refused_with_one_line(tmp_path, content):
    check(tmp_path, content)
