"""Counts of meta tensors against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.memory.dry_run import META, MemoryTracker, dry_run

SQUARE = 128 * 128 * 4  # bytes of a float32 square of side 128


@pytest.mark.parametrize("recomputed", [False, True])
def test_two_layers_save_what_is_counted_by_hand(recomputed):
    first, second = (nn.Linear(128, 128, bias=False, device=META) for _ in range(2))
    x = torch.empty(128, 128, device=META, requires_grad=True)
    tracker = MemoryTracker()

    def body(x):
        return second(first(x).relu())

    with dry_run(tracker):
        tracker.attribute([x, first.weight, second.weight], "weights")
        y = checkpoint(body, x, use_reentrant=False) if recomputed else body(x)
        # the rectifier's output, which both it and the second layer save, and y; recomputed, y alone
        assert tracker.total - tracker.live["weights"] == (1 if recomputed else 2) * SQUARE and tracker.live["weights"] == 3 * SQUARE
        y.sum().backward()
        del y
        assert tracker.total == 6 * SQUARE  # the weights and three gradients


def test_attention_is_linear_in_the_tokens():
    q = torch.empty(1, 1, 2048, 64, device=META, requires_grad=True)
    tracker = MemoryTracker()
    with dry_run(tracker):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert 2048 * 64 * 4 < tracker.peak.bytes < 2048 * 2048 * 4
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_components_and_phases():
    tracker = MemoryTracker()
    with dry_run(tracker):
        weight = torch.empty(128, 128, device=META)
        with tracker.phase("a"), tracker.component("model"):
            kept = weight * 2
            (weight * 3).sum()
        with tracker.component("model, backward"), tracker.phase("a"):
            pass  # the higher peak of one name stays
        with tracker.phase("b"):
            tracker.attribute([kept], "other")
            del kept
    peak = tracker.phases["a"]
    assert peak.components["model"] == 2 * SQUARE + 512 and peak.running == "model"
    assert tracker.phases["b"].bytes == 2 * SQUARE and tracker.live["other"] == SQUARE


def test_a_real_device_is_counted_alike():
    tracker = MemoryTracker(torch.device("cpu"))
    with tracker:
        x = torch.zeros(128, 128)
        y = [x + 1, x + 2]
        assert tracker.total == 3 * SQUARE
        del y
    assert tracker.total == SQUARE and tracker.peak.bytes == 3 * SQUARE
