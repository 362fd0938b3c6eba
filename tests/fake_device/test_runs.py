"""What a run does beside its steps on the fake device: watching, averaging, saving, resuming, tuning whole, saving memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fake_device.runs import on_cpu, on_fake, same_numbers, same_run, same_tensors
from safetensors.torch import load_file

REFL = ["--objective.name=refl", "--objective.steps=6", "--objective.grad_from=3", "--objective.grad_to=5", "--batch_size=2"]

TRANSFORMER = Path(__file__).parents[1] / "data" / "v010" / "rewards" / "proxy"  # a reward that can recompute its activations


def test_a_watched_run_is_resumed_to_the_same_files(image_folder, tmp_path):
    starts = ["--objective.name=imagerefl", "--objective.steps=6", "--objective.grad_from=3", "--objective.grad_to=5"]
    starts += ["--objective.start_from=2", "--objective.start_to=3", "--batch_size=2", "--gradient_accumulation_steps=2"]
    watched = ["--watch.every=1", "--watch.heldout=demo-gold", "--watch.count=2", "--watch.images=2", "--watch.steps=3"]
    arguments = ["train", f"--images={image_folder}", *starts, *watched, "--ema=0.5", "--save_every=1"]
    whole, cut = tmp_path / "cpu", tmp_path / "fake"
    on_cpu(*arguments, f"--out={whole}", "--steps=2")
    arguments += [f"--out={cut}", f"--cache={tmp_path / 'cache'}", "--deterministic=true"]
    on_fake("mps", *arguments, "--steps=1")
    on_fake("mps", *arguments, "--steps=2", "--resume")
    same_run(cut, whole)
    points = json.loads((whole / "watch.json").read_text())
    assert len(points) == 3 and points[0]["heldout"] != points[-1]["heldout"]
    same_numbers(json.loads((cut / "watch.json").read_text()), points)
    same_tensors(load_file(cut / "best.safetensors"), load_file(whole / "best.safetensors"))


def products(lora):
    """All of a LoRA's updates, end to end."""
    ups = {name: value.float() for name, value in lora.items() if name.endswith("lora_up.weight")}
    downs = (lora[name.replace("lora_up", "lora_down")].float().flatten(1) for name in ups)
    return torch.cat([(up.flatten(1) @ down).flatten() for up, down in zip(ups.values(), downs)])


def test_every_weight_is_tuned(tmp_path):
    arguments = ["train", "--images=demo", *REFL, "--tune=full", "--steps=1"]
    on_cpu(*arguments, f"--out={tmp_path / 'cpu'}")
    on_fake("mps", *arguments, f"--out={tmp_path / 'fake'}")
    same_run(tmp_path / "fake", tmp_path / "cpu", "delta.safetensors")

    on_cpu("convert", tmp_path / "cpu" / "delta.safetensors", tmp_path / "exact.safetensors", "--rank=4", "--exact")
    on_fake("mps", "convert", tmp_path / "cpu" / "delta.safetensors", tmp_path / "random.safetensors", "--rank=4")
    exact, random = (products(load_file(tmp_path / f"{name}.safetensors")) for name in ("exact", "random"))
    error = float((random - exact).norm() / exact.norm())
    assert error < 0.1, f"a LoRA extracted on the device is {error:.1%} off the exact one"


def test_settings_of_memory_change_no_value(tmp_path):
    arguments = ["train", "--images=demo", *REFL, "--steps=1", "--vae_slicing=true", f"--reward={TRANSFORMER}"]
    recomputed = [f"--gradient_checkpointing_{part}=true" for part in ("denoiser", "vae", "reward")]
    on_cpu(*arguments, f"--out={tmp_path / 'cpu'}")
    on_fake("mps", *arguments, *recomputed, "--offload_encoders=false", f"--out={tmp_path / 'fake'}")
    same_run(tmp_path / "fake", tmp_path / "cpu")
