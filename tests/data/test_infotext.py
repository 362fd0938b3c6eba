"""A sidecar file of generation settings gives its positive prompt as the caption, not the whole text."""

from __future__ import annotations

import json

import pytest
from helpers.images import write_image

from trainer.data.captions import read_captions
from trainer.data.infotext import positive_prompt
from trainer.data.report import Report

SETTINGS = "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 64x64, Version: v1.10.1"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"a red star\nNegative prompt: blurred,\npale\n{SETTINGS}", "a red star"),
        (f"a red star\r\nNegative prompt: blurred\r\n{SETTINGS}\r\n", "a red star"),
        (f"a red star,\n<lora:x:1> crisp\n{SETTINGS}", "a red star,\n<lora:x:1> crisp"),
        (f"a red star Negative prompt: blurred {SETTINGS}", "a red star"),
        ("a red star\nnegative prompt: blurred", "a red star"),
        (f"Negative prompt: blurred\n{SETTINGS}", ""),
        (SETTINGS, ""),
        (json.dumps({"sui_image_params": {"prompt": "a red star", "steps": 20}}, indent=1), "a red star"),
        (f"{{red|blue}} star\nNegative prompt: pale\n{SETTINGS}", "{red|blue} star"),
        (f"a sign: Negative prompt: none\n{SETTINGS}", "a sign: Negative prompt: none"),
        (f"a receipt,\nSteps: 3, Size: small\nNegative prompt: pale\n{SETTINGS}", "a receipt,\nSteps: 3, Size: small"),
        (f"a red star\n{SETTINGS}\nNegative prompt: of a template", "a red star"),
        ("a red star", None),
        ("Steps: a stair in the fog", None),
        ("a sign that reads Negative prompt: yes", None),
        ("{red|blue} star", None),
        ("", None),
    ],
)
def test_positive_prompts_are_found(text, prompt):
    assert positive_prompt(text) == prompt


def test_the_text_beside_an_image_is_its_first_line_or_its_positive_prompt(tmp_path):
    texts = {
        "a.txt": (f"a red star,\ncrisp\nNegative prompt: pale\n{SETTINGS}", "a red star,\ncrisp"),
        "b.txt": ("\na blue ring\n\nthe same ring, and a line\n", "a blue ring"),
        "c.caption": ("kohya's suffix", "kohya's suffix"),
        "d.png.txt": ("whole name", "whole name"),
        "e.TXT": ("a text of\u2028one line", "a text of\u2028one line"),
    }
    for i, (name, (text, _)) in enumerate(texts.items()):
        write_image(tmp_path / f"{name[0]}.png", i)
        (tmp_path / name).write_text(text, "utf-8")
    report = Report()
    assert [caption for _, caption in read_captions(str(tmp_path), report)] == [caption for _, caption in texts.values()]
    assert str(report).split("; ", 1)[1] == (
        "left out: nothing; 1 with generation settings, the positive prompt taken (a.txt), "
        "1 with several lines, the first taken as the caption (b.txt)"
    )
    (tmp_path / "b.txt").write_text('{"caption": "a ring"}')
    with pytest.raises(ValueError, match=r"b.txt holds JSON, not a prompt"):
        read_captions(str(tmp_path))
    (tmp_path / "b.txt").write_text(SETTINGS)
    (tmp_path / "c.caption").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"b.png has no caption: .* beside it \(and 1 more\), or give .*metadata.csv for the folder"):
        read_captions(str(tmp_path))
