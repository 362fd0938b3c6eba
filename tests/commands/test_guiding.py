"""`sample --guide`: two models at once, against their formula, and flags that do not fit together."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.comfyui import random_lora
from PIL import Image
from safetensors.torch import save_file

from trainer.__main__ import _parse, main
from trainer.commands.guiding import guiding
from trainer.commands.options import generation_of
from trainer.commands.two_parts import two_parts
from trainer.demo.files import CONSISTENCY as LORA
from trainer.lora.several import load_loras
from trainer.models.unet import UNetPolicy
from trainer.rng import Rng

STEPS, S = 3, 4.0


@pytest.fixture(scope="module")
def loras(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [random_lora(pipeline_folder, folder / f"{seed}.safetensors", seed) for seed in (7, 8)]


def run(out, folder, *more):
    arguments = ["sample", "--model", folder, "--prompt", "a red star", "-n", 2, "--steps", STEPS, "--method", "ddim", "--out", out]
    return main(list(map(str, [*arguments, "--guidance-scale", S, *more])))


@torch.no_grad()
def test_npo_is_guidance_whose_negative_has_one_lora_more(pipeline_folder, loras, tmp_path, capsys):
    """Two policies that share nothing, DDIM by hand; the negative model has the positive LoRA and, at 0.7, that of flipped preferences."""
    positive, flipped = loras
    more = ["--lora", positive, "--base-lora", positive, "--base-lora", f"{flipped}:0.7", "--negative", "a grey square", "--guide", "npo"]
    assert run(tmp_path / "x", pipeline_folder, *more) == 0
    assert f"(npo, {2 * STEPS} network calls an image)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "x" / "settings.json").read_text())
    assert stored["guide"] == {"name": "npo"} and stored["k"] is None
    p, n = (UNetPolicy.load(pipeline_folder) for _ in range(2))
    load_loras(p, [(positive, 1.0)])
    load_loras(n, [(positive, 1.0), (flipped, 0.7)])
    x, levels = p.start(Rng(0, 0, (0, 1)).start_noise(p.latent_shape), STEPS), p.sigmas(STEPS)
    cond, uncond = p.denoiser(["a red star"] * 2), n.denoiser(["a grey square"] * 2)
    for now, after in itertools.pairwise(levels):
        sigma = now.expand(2)
        clean = uncond(x, sigma) + S * (cond(x, sigma) - uncond(x, sigma))
        x = clean + after * (x - clean) / now
    for i, image in enumerate(p.decode(x)):
        found = torch.from_numpy(np.array(Image.open(tmp_path / "x" / f"0000{i}.png"))).movedim(-1, 0) / 255
        assert float((found - image).abs().max()) < 1.5 / 255


def test_rl_guidance_of_weight_1_is_the_tuned_model_with_guidance(pipeline_folder, loras, tmp_path):
    for name, more in (("rl", ["--guide", "rl", "--guide-weight", 1]), ("tuned", ["--switch", 0, "--tuned-guidance-scale", S])):
        assert run(tmp_path / name, pipeline_folder, "--lora", loras[0], *more) == 0
    files = [(tmp_path / name / "00001.png").read_bytes() for name in ("rl", "tuned")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guide", "rl"], "--guide rl needs a tuned model: give --lora or --tuned-model"),
        (["--guide", "npo"], "--guide npo needs the negative model"),
        (["--guide", "chats", "--guide-weight", 2], "--guide-weight is of --guide rl and autoguidance, not of chats"),
        (["--guide-power", 2], "--guide-power is of --guide aig, not of combined"),
        (["--guide", "custom"], "--guide-table: no coefficients: write rows"),
        (["--guide", "custom", "--guide-table", "1: 1, 1"], "--guide-table: coefficients '1: 1, 1' sum to 2: they must sum to 1"),
        (["--guide", "chats", "--switch", 2], "--switch is of combined generation: leave out --guide chats"),
        (["--guide", "chats", "--tuned-steps", 2], "--tuned-steps is of combined generation"),
        (["--guide", "chats", "--guide-proxy", 11], "--guide-proxy = 11.0: give at most 10"),
        (["--guide", "rl", "--lora", LORA, "--tuned-guidance-scale", 2], "--guide rl does not read --tuned-guidance-scale: leave it out"),
        (["--guide", "autoguidance", "--lora", LORA], "--guide autoguidance does not read --guidance-scale: leave it out"),
        (["--guide", "custom", "--guide-table", "1: 1,0"], "--guide custom does not read --guidance-scale: leave it out"),
        (["--guide", "npo", "--lora", LORA, "--tuned-negative", "x"], "--guide npo does not read --tuned-negative: leave it out"),
        (
            ["--guide", "aig", "--lora", LORA, "--tuned-negative", "x"],
            "--tuned-negative is read with guidance alone: give --tuned-guidance-s",
        ),
        (
            ["--guide", "rl", "--lora", LORA, "--negative", "x", "--guidance-scale", 1],
            "--negative is read with guidance alone: give --guidan",
        ),
        (["--tuned-guidance-scale", 2], "--tuned-guidance-scale is of the tuned part: give --lora or --tuned-model"),
        (["--switch", "75%"], "--switch is of the tuned part: give --lora or --tuned-model"),
        (["--strength", 0.5, "--base-lora", LORA], "--strength is of LoRAs of the tuned part: give --lora, or --base-lora FILE:0.8"),
        (["--lora", LORA, "--tuned-prompt", "{Prompt }, x"], "--tuned-prompt '{Prompt }, x': the image's own prompt is written {prompt}"),
    ],
)
def test_a_guide_that_cannot_be_is_refused_before_a_model_is_loaded(more, message, tmp_path, capsys):
    assert run(tmp_path / "x", tmp_path / "no such model", *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("guide", "tuned", "base", "wrong"),
    [
        ("chats", "winner", ["loser"], ""),
        ("chats", "loser", ["winner"], "loser.safetensors is CHATS's loser: give it as --base-lora, not as --lora"),
        ("chats", "dpo", ["winner"], "winner.safetensors is CHATS's winner: give it as --lora, not as --base-lora"),
        ("npo", "dpo", ["dpo", "negative"], ""),
        ("npo", "negative", ["dpo"], "negative.safetensors is the negative model: give it as --base-lora, not as --lora"),
        ("rl", "winner", [], ""),
    ],
)
def test_a_lora_of_a_guide_is_refused_where_it_stands_for_the_other_model(guide, tuned, base, wrong, tmp_path, capsys):
    """As training names them: both of CHATS are for its guide, and the loser's file says which adapter it holds."""
    known = {"winner": {"guide": "chats"}, "loser": {"guide": "chats", "adapter": "tuned-loser"}, "negative": {"guide": "npo"}, "dpo": {}}
    for name, metadata in known.items():
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors", {"imagerefl": json.dumps(metadata)})
    files = ["--lora", tuned, *(word for one in base for word in ("--base-lora", one))]
    files = [word if word.startswith("--") else tmp_path / f"{word}.safetensors" for word in files]
    assert run(tmp_path / "x", tmp_path / "no such model", "--guide", guide, *files) == 2
    said = capsys.readouterr().err
    assert wrong in said if wrong else "no such model" in said and "give it as" not in said


@pytest.mark.parametrize(
    "more",
    [
        ["--guide", "chats", "--guidance-scale", 1, "--negative", "x", "--tuned-prompt", "{prompt}, y"],
        ["--guide", "custom", "--guide-table", "1: 2,-1,0,0", "--negative", "x"],
        ["--guide", "custom", "--guide-table", "1: 1,0,1,-1", "--tuned-negative", "x"],
        ["--guide", "rl", "--lora", LORA, "--guidance-scale", 3, "--tuned-negative", "x"],
        ["--guide", "double-cfg", "--lora", LORA, "--tuned-guidance-scale", 3, "--tuned-negative", "x", "--guidance-scale", 0],
    ],
)
def test_a_scale_or_negative_that_a_guide_reads_is_accepted(more):
    args = _parse(list(map(str, ["sample", "--prompt", "x", "--out", "x", *more])))
    settings = generation_of(args)
    assert guiding(args, two_parts(args), settings) is not None


def test_a_range_without_a_step_is_refused_before_the_first_image(pipeline_folder, loras, tmp_path, capsys):
    more = ["--lora", loras[0], "--guide", "rl", "--guide-start", 0.5, "--guide-end", 0.5]
    assert run(tmp_path / "x", pipeline_folder, *more) == 2 and not (tmp_path / "x").exists()
    assert "--guide rl: no step of the 3 lies from start 0.5 to end 0.5" in capsys.readouterr().err


def test_the_dials_of_detail_are_written_only_where_they_are_set(pipeline_folder, tmp_path, capsys):
    dials = {"plain": [], "dense": ["--density", 0.3], "noise": ["--noise-quantile", 0.5, "--noise-scale", 1.02]}
    assert [run(tmp_path / name, pipeline_folder, *more) for name, more in dials.items()] == [0, 0, 0]
    settings = {name: json.loads((tmp_path / name / "settings.json").read_text()) for name in dials}
    new = {name: {key: value for key, value in found.items() if key not in settings["plain"]} for name, found in settings.items()}
    assert new == {"plain": {}, "dense": {"density": 0.3}, "noise": {"noise_quantile": 0.5, "noise_scale": 1.02}}
    assert len({(tmp_path / name / "00000.png").read_bytes() for name in dials}) == 3
    assert run(tmp_path / "x", pipeline_folder, "--density", 0) == 2
    assert "density = 0.0: give at least 0.001" in capsys.readouterr().err
