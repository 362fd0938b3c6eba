"""Devices: refused where they are not there, and whose peak memory is read."""

from __future__ import annotations

import pytest
import torch

from trainer.runtime.device import peak_gb, set_cudnn_attention, set_precision


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_peak_is_that_of_the_named_gpu(kind, monkeypatch):
    peaks = {None: 1e9, kind: 2e9, f"{kind}:1": 3e9}
    monkeypatch.setattr(f"torch.{kind}.max_memory_allocated", lambda device=None: peaks[device], raising=False)
    assert (peak_gb(kind), peak_gb(f"{kind}:1")) == (2.0, 3.0)


def test_a_gpu_multiplies_in_tf32_unless_the_run_is_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    calls = []
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: calls.append(precision))
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda on: calls.append(on))
    for device, deterministic, expected in [("cpu", False, []), ("cpu", True, []), ("cuda:0", False, ["high"]), ("cuda", True, [True])]:
        calls.clear()
        set_precision(device, deterministic=deterministic)
        assert calls == expected
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_has_neither_cudnns_attention_nor_tf32_where_float32_is_asked_for(monkeypatch):
    """cuDNN's attention has NaN gradients on an H100, and PyTorch's default is TF32 in convolutions alone."""
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    before = set_cudnn_attention(True)
    try:
        set_precision("cpu", deterministic=True)
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.allow_tf32
        set_precision("cuda", deterministic=True)
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
    finally:
        set_cudnn_attention(before)
