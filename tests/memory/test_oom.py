"""Peak memory: of the device that is asked for."""

from __future__ import annotations

import pytest

from trainer.memory.oom import peak_gb


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_peak_is_that_of_the_named_gpu(kind, monkeypatch):
    peaks = {None: 1e9, kind: 2e9, f"{kind}:1": 3e9}
    monkeypatch.setattr(f"torch.{kind}.max_memory_allocated", lambda device=None: peaks[device], raising=False)
    assert (peak_gb(kind), peak_gb(f"{kind}:1")) == (2.0, 3.0)
