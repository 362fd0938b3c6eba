"""Running out of memory: where it happened."""

from __future__ import annotations

import traceback

_PLACES = (  # file and function of a traceback's frames, and what is happening there
    ("models/diffusers_policy.py", "decode", "the autoencoder's decoder"),
    ("models/diffusers_policy.py", "encode", "the autoencoder's encoder"),
    ("models/prompts.py", "_encode", "the text encoders"),
    ("models/diffusers_policy.py", "__call__", "the denoiser"),
    ("models/load.py", "", "loading the model"),
    ("models/diffusers_policy.py", "to", "bringing the model to the device"),
    ("rewards/registry.py", "load", "loading a reward"),
    ("trainer/rewards", "", "the reward"),
    ("trainer/reward.py", "", "the reward"),
    ("commands/train.py", "_place_rewards", "bringing the rewards to the device"),
    ("torch/optim", "", "the optimizer"),
    ("training/evaluation.py", "", "an evaluation"),
    ("torch/autograd", "backward", "the backward pass"),
    ("trainer/data/", "", "reading the data"),
)


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, what is safe, and what to try."""


def place(error: BaseException) -> str:
    """Where it ran out, in one phrase; "" where the frames do not say. The reward called by an objective says so itself."""
    frames = [(f.filename.replace("\\", "/"), f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    inner = frames[next((i + 1 for i in reversed(range(len(frames))) if "torch/autograd" in frames[i][0]), 0) :]
    words = [where for file, name, where in _PLACES if any(file in f and name in ("", n) for f, n, _ in frames)]
    if len(inner) < len(frames) and "the backward pass" in words:
        return " of ".join(["the backward pass", *words[:1]]) if words[0] != "the backward pass" else words[0]
    if not words and any("trainer/objectives" in f and "reward(" in line for f, _, line in frames):
        return "the reward"
    return words[0] if words else ""
