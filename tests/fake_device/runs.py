"""Runs of the commands on the fake device and, as its reference, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from fake_device.strict import strict
from safetensors.torch import load_file
from torch import Tensor

from trainer.__main__ import main
from trainer.demo import show
from trainer.runtime import device as runtime

DEVICE = os.environ.get("TEST_DEVICE", "fake:1")  # not the first: what forgets its index lands on another device
FAKE = DEVICE.startswith("fake")
TOLERANCE = 1e-6 if FAKE else 1e-3  # of figures; a card's kernels sum in another order
WEIGHTS = 1e-6 if FAKE else 2e-5  # of weights, whose first step is the learning rate, 1e-4
SHARE = 0.001 if FAKE else 0.05  # of weights that may differ by more: those whose gradient is nearly zero


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Attention as the fake device computes it: by the formula, which the CPU's fused kernel rounds otherwise."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # before torch 2.3
        with torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False):
            yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def on_cpu(*arguments: Any) -> None:
    """Run a command on the CPU."""
    with reference():
        run("cpu", *arguments)


def on_fake(mode: Literal["cuda", "mps"], *arguments: Any) -> None:
    """Run a command on the fake device, or the one of TEST_DEVICE in full float32."""
    if FAKE:
        with strict(mode):
            run(DEVICE, *arguments)
        return
    precise = runtime.set_precision
    with patch.object(runtime, "set_precision", lambda device, **_: precise(device, deterministic=True)):
        run(DEVICE, *arguments, *(["--deterministic=true"] if arguments[0] == "train" else []))


def run(device: str, *arguments: Any) -> None:
    """Run a command on a device; it must end well."""
    with _few_images(), as_before():
        code = main([*map(str, arguments), *([f"--device={device}"] if arguments[0] == "train" else ["--device", device])])
    assert code == 0, f"exit status {code}"


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Precision and determinism are of the process: leave them as they were."""
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def _few_images() -> Any:
    """`images = demo` renders and encodes eight of them."""
    return patch.object(show, "FULL", dataclasses.replace(show.FULL, real=8))


def log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "memory_gb")} for line in lines]


def same_numbers(found: Any, expected: Any, where: str = "") -> None:
    """Nested values are equal, numbers within TOLERANCE, absolute or relative."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same_numbers(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            same_numbers(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE), f"{where}: {found} on the device, {expected} on the CPU"
    else:
        assert found == expected, where


def same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Tensors are equal within WEIGHTS, but for few elements: Adam's first step is lr·g/(|g| + 1e-8), and where a gradient
    is nearly zero its rounding decides."""
    assert found.keys() == expected.keys()
    off = torch.cat([(found[name].float() - value.float()).abs().flatten() for name, value in expected.items()])
    share, most = float((off > WEIGHTS).float().mean()), float(off.max())
    if not FAKE:
        print(
            f"weights: {share:.2%} of {len(off)} off by more than {WEIGHTS}, one by {most:.2e}, RMS {float(off.square().mean().sqrt()):.2e}"
        )
    assert share < SHARE and most < 20 * WEIGHTS, f"{share:.2%} of the weights differ by more than {WEIGHTS}, one by {most}"


def same_run(found: Path, expected: Path, result: str = "lora.safetensors") -> None:
    """Two runs have the same log and the same weights, and these have moved."""
    same_numbers(log(found), log(expected))
    weights = load_file(expected / result)
    same_tensors(load_file(found / result), weights)
    moved = max(float(value.abs().max()) for name, value in weights.items() if "lora_up" in name or "lora_B" in name or "diff" in name)
    assert moved > 10e-6, f"the weights moved by {moved}: too little to compare"
