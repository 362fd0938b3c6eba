"""A step of each model family on the fake device, to the CPU's loss and weights."""

from __future__ import annotations

import pytest
from fake_device.runs import DEVICE, FAKE, log, on_cpu, on_fake, run, same_run


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *[
            ("sd15", "float32"),
            ("sdxl", "float32"),
            ("sd3", "float32"),
            ("flux-dev", "float32"),
            ("sd15", "bfloat16"),
            ("flux-dev", "bfloat16"),
        ],
        *[pytest.param(name, "float32", marks=pytest.mark.full) for name in ("klein", "z-image", "chroma", "krea2", "qwen-image", "anima")],
        *[pytest.param(name, "bfloat16", marks=pytest.mark.full) for name in ("sdxl", "sd3", "klein", "z-image", "chroma", "anima")],
    ],
    indirect=["family"],
)
def test_a_step_is_that_of_the_cpu(family, dtype, reward_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    arguments = ["train", f"--model={family}", f"--reward={reward_folder}", f"--prompts={tmp_path / 'prompts.txt'}", "--image_size=64"]
    arguments += [
        f"--model_options.dtype={dtype}",
        "--batch_size=2",
        "--steps=1",
        "--objective.name=refl",
        "--objective.guidance_scale=3.0",
    ]
    arguments += ["--objective.steps=4", "--objective.grad_from=1", "--objective.grad_to=3"]
    on_cpu(*arguments, f"--out={tmp_path / 'cpu'}")
    if dtype == "bfloat16" and not FAKE:  # as it is trained: the attention that PyTorch chooses, and rounding
        run(DEVICE, *arguments, f"--out={tmp_path / 'fake'}")
        (found,), (expected,) = log(tmp_path / "fake"), log(tmp_path / "cpu")
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02) and found["grad_norm"] == pytest.approx(
            expected["grad_norm"], rel=0.1
        )
        return
    on_fake("mps", *arguments, f"--out={tmp_path / 'fake'}")
    same_run(tmp_path / "fake", tmp_path / "cpu")
