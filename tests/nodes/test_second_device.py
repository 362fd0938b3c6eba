"""The nodes on the test suite's second device, in a real ComfyUI: what only an accelerator would show."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_device.build import NoCompiler, library
from helpers.comfyui import PLACES, comfyui, run_inside

PARTS = ["switch", "range", "demo-proxy", "demo-heldout", "demo-gold", "diversity", "loss", "preview", "lora"]


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, tmp_path_factory):
    try:
        library()
    except NoCompiler as reason:
        pytest.skip(str(reason))
    return run_inside(request.param, "second_device.py", cwd=tmp_path_factory.mktemp("device"))


@comfyui
@pytest.mark.parametrize("part", PARTS)
def test_what_comes_out_is_the_cpus(told, part):
    """No operator got tensors of two devices on the way: the device refuses that."""
    assert told["device"] == ["fake:1"]
    assert told["errors"][part] <= 1e-6, told["errors"]


@comfyui
def test_attention_with_a_gradient_is_not_cudnns(told):
    """Which ComfyUI asks for first where there is CUDA."""
    with_gradient = [rest for gradient, *rest in told["attention"] if gradient]
    assert with_gradient == [["MATH", False]], told["attention"]
    assert told["order afterwards"] == "CUDNN_ATTENTION"


@comfyui
def test_a_sampling_run_waits_for_the_device_once_per_step(told):
    """For the level of the step, which decides whose step it is; and a few times per run, for the plan, the switch and the result."""
    assert told["reads in the loop"] == 6
    assert len(told["other reads"]) <= 9, told["other reads"]
