"""Arguments that several commands share."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from trainer.commands.options import warn_of_guidance
from trainer.generate import Generation


@pytest.mark.parametrize(("recorded", "given", "warned"), [(7.5, None, True), (7.5, 1.0, False), (1.0, None, False), (None, None, False)])
def test_a_lora_that_is_drawn_with_guidance_is_told_of_where_the_tuned_part_has_none(tmp_path, caplog, recorded, given, warned):
    """As a LoRA on preferences is, whose run recorded the guidance of its evaluations."""
    path = tmp_path / "dpo.safetensors"
    save_file({"x.lora_down.weight": torch.zeros(1, 1)}, path, {"imagerefl": json.dumps({"tuned_guidance": recorded})})
    settings = Generation(guidance_scale=2.0) if given is None else Generation(guidance_scale=2.0, tuned_guidance_scale=given)
    warn_of_guidance(Namespace(tuned_guidance_scale=given), settings, [path])
    said = f"{path} is for drawing with guidance (7.5 in its training's settings), and the tuned part has none: give "
    assert caplog.messages == ([f"{said}--tuned-guidance-scale, such as the base's 2; 1 leaves it so"] if warned else [])
