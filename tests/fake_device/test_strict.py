"""The device itself: it computes as the CPU does, refuses what real ones refuse, and counts what crosses."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from fake_device.runs import reference
from fake_device.strict import Refused, strict
from torch import nn
from torch.nn import functional as F

HERE, THERE = "fake:1", "fake:0"


def block(x, weight, kernel):
    """Convolution, normalisation, attention, indexing and views: what networks are made of."""
    x = F.silu(F.group_norm(F.conv2d(x, kernel, padding=1), 2))
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2) @ weight, (8,))
    seen = F.scaled_dot_product_attention(*(tokens[:, None] for _ in range(3)))[:, 0].clone()
    seen[:, 0] += 1
    return F.interpolate(F.gelu(seen[:, :, ::2]).unfold(1, 2, 2).mean(-1)[:, None], scale_factor=2).cumsum(-1)


def test_an_operator_without_a_deterministic_form_is_refused_where_one_is_asked_for():
    x = torch.rand(3, 5).to(HERE)
    torch.use_deterministic_algorithms(True)
    try:
        with strict("cuda"):
            assert torch.equal(x.sort(1).values[:, 2].cpu(), x.cpu().median(1).values) and x.median().ndim == 0
            assert (x > 0).cumsum(1).max() == 5
        for refused in (lambda: x.median(1), lambda: x.cumsum(1)):
            with pytest.raises(Refused, match="no deterministic form"), strict("cuda"):
                refused()
    finally:
        torch.use_deterministic_algorithms(False)


def test_values_and_gradients_are_those_of_the_cpu():
    draws = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draws) for shape in ((2, 4, 6, 6), (8, 8), (8, 4, 3, 3))]
    outputs, gradients = [], []
    for device in ("cpu", HERE):
        leaves = [t.to(device).requires_grad_() for t in inputs]
        with reference():
            outputs.append(block(*leaves))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), leaves))
    assert str(outputs[1].device) == HERE
    for expected, found in zip([outputs[0], *gradients[0]], [outputs[1], *gradients[1]]):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_views_share_memory_and_outputs_may_grow():
    whole = torch.arange(12.0).reshape(3, 4).to(HERE)
    whole[1:].T.unfold(1, 2, 1).mul_(2)
    assert whole.cpu().tolist() == [[0, 1, 2, 3], [8, 10, 12, 14], [16, 18, 20, 22]]
    out = torch.empty(0, device=HERE)
    torch.add(whole, 1, out=out)
    assert out.shape == (3, 4) and float(out[2, 3]) == 23
    out.resize_(6, 4)
    assert out.shape == (6, 4) and float(out[2, 3]) == 23


def test_modules_are_copied_saved_and_loaded():
    module, file = nn.Linear(3, 3).to(HERE), io.BytesIO()
    torch.save(copy.deepcopy(module).state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    assert torch.equal(loaded["weight"], module.weight.cpu()) and str(module.weight.device) == HERE


BOTH = {
    "two devices": lambda x: x + x.to(THERE),
    "a CPU tensor": lambda x: x + torch.ones(3, 4),
    "a CPU matrix": lambda x: x @ torch.ones(4, 4),
    "a CPU scalar in a list": lambda x: torch.stack([x[0, 0], torch.ones(())]),
    "a CPU index of gather": lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "a device index of a CPU tensor": lambda x: torch.ones(3)[torch.tensor([0]).to(HERE)],
    "a CPU value put into": lambda x: x.index_put((torch.tensor([0]),), torch.ones(1, 4)),
    "a CPU generator": lambda x: torch.randn(3, generator=torch.Generator(), device=HERE),
    "a CPU generator in place": lambda x: x.normal_(generator=torch.Generator()),
}
MPS = {
    "float64": lambda x: x.double(),
    "float64 to the device": lambda x: torch.ones(2, dtype=torch.float64).to(HERE),
    "a conversion on the way out": lambda x: x.to("cpu", torch.float64),
    "a conversion into a CPU tensor": lambda x: torch.zeros(3, 4, dtype=torch.float64).copy_(x),
    "a converted view with an offset": lambda x: x[1].to("cpu", torch.float16),
}
ALLOWED = {
    "a CPU scalar": lambda x: x * torch.tensor(2.0, dtype=torch.float64) + torch.ones(()),
    "a CPU index": lambda x: x[torch.tensor([0, 2])],
    "a conversion on the way in": lambda x: torch.ones(2, dtype=torch.float64).to(HERE, torch.float32),
    "two steps on the way out": lambda x: x[1].cpu().double(),
    "CPU noise": lambda x: x + torch.randn(3, 4, generator=torch.Generator()).to(x),
}


@pytest.mark.parametrize("mode", ["cuda", "mps"])
def test_what_real_devices_refuse_is_refused(mode):
    refused = {**BOTH, **(MPS if mode == "mps" else {})}
    allowed = {**ALLOWED, **(MPS if mode == "cuda" else {})}
    for name, operation in {**refused, **allowed}.items():
        x, caught = torch.ones(3, 4).to(HERE), False
        try:
            with strict(mode):
                operation(x)
        except Refused:
            caught = True
        assert caught == (name in refused), f"{name}: {'refused' if caught else 'let through'}"


def test_a_refusal_that_the_code_swallows_is_raised_in_the_end():
    with pytest.raises(Refused, match="tensors on several devices"), strict("cuda"), contextlib.suppress(Exception):
        torch.ones(2).to(HERE) + torch.ones(2)


def test_reads_and_uploads_are_counted():
    x = torch.ones(3, 4).to(HERE)
    with strict("cuda") as device:
        with device.region() as reads:
            x[0, 0].item(), float(x[0, 0]), bool(x[0, 0] > 0), x.tolist(), x.cpu(), torch.zeros(3, 4).copy_(x), x[x > 0], x.nonzero()
        with device.region() as uploads:
            x.copy_(torch.ones(3, 4)), torch.ones(()).to(HERE), torch.tensor([1.0], device=HERE), x[torch.tensor([0])]
        with device.region() as nothing:
            x + 1, x[0], x[:, 1:], x.to(torch.float16), torch.zeros(2, device=HERE), x.sum(), torch.where(x > 0, x, 0.0)
        with device.region() as backward:
            leaf = x.clone().requires_grad_()
            checked = torch.utils.checkpoint.checkpoint(lambda t: float(t.detach()[0, 0]) * t.exp(), leaf, use_reentrant=False)
            checked.sum().backward()
    assert (reads.reads, reads.uploads) == (8, 0), reads
    assert (uploads.reads, uploads.uploads) == (0, 4), uploads
    assert (nothing.reads, nothing.uploads) == (0, 0), nothing
    assert backward.reads == 2, backward  # once forwards, once in the recomputation of the backward pass
    assert device.whole.reads == 10 and device.whole.uploads == 4
