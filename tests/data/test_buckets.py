"""Pictures keep their aspect ratio: sizes, crops, an order whose micro-batches hold one size, and runs on them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.family import Family
from helpers.losses import batch_of
from helpers.processes import finish, log_of, said, start, toy_run
from PIL import Image

from trainer.data import images
from trainer.data.buckets import bucket_sizes, micro_batch, nearest
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.models.flux import FluxPolicy
from trainer.models.sd3 import SD3Policy
from trainer.models.sdxl import SDXLPolicy
from trainer.models.unet import UNetPolicy
from trainer.objectives import OBJECTIVES, RunContext
from trainer.rng import Rng, generator
from trainer.runtime.processes import ALONE, joined


def test_the_sizes_of_512_and_1024_are_those_found_by_hand():
    assert set(bucket_sizes(512, 8)) == {(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)}
    wide = [(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408)]
    assert [size for size in bucket_sizes(1024, 16) if size[0] <= size[1]] == wide


@pytest.mark.parametrize(("size", "unit", "step"), [(64, 8, 8), (256, 16, 16), (512, 8, 64), (520, 8, 64), (768, 48, 192), (1024, 16, 64)])
def test_no_size_has_more_pixels_than_the_square(size, unit, step):
    sizes = bucket_sizes(size, unit)
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= size * size < (min(height, width) + step) * max(height, width)
        assert max(height, width) <= 2 * min(height, width)


def test_a_size_below_the_model_unit_is_refused():
    with pytest.raises(ValueError, match="image_size = 8: buckets of this model have sides of 16 pixels and more"):
        bucket_sizes(8, 16)


def test_a_picture_is_cropped_never_squeezed(tmp_path):
    """A disc stays a disc, whichever bucket it falls into, and the crop is the middle."""
    sizes = bucket_sizes(64, 8)
    cases = [((300, 200), (48, 80)), ((200, 300), (80, 48)), ((250, 250), (64, 64)), ((900, 300), (48, 80)), ((250, 200), (56, 72))]
    for i, ((width, height), expected) in enumerate(cases):
        x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
        disc = (np.hypot(x, y) < 0.3 * min(width, height)).astype(np.uint8) * 255
        Image.fromarray(disc).convert("RGB").save(tmp_path / f"{i}.png")
        assert images.size_of(tmp_path / f"{i}.png") == (height, width)
        size = nearest((height, width), sizes)
        assert size == expected
        found = images.load(tmp_path / f"{i}.png", size)[0] > 0.5
        rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
        tall, wide = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert found.shape == size and abs(tall - wide) <= 1
        assert abs(tall - 0.6 * min(width, height) * max(size[0] / height, size[1] / width)) <= 1.5
        middle = found.nonzero().double().mean(0) + 0.5
        assert (middle - torch.tensor(size) / 2).abs().max() <= 0.6


def test_a_turned_photograph_has_the_bucket_of_what_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert images.size_of(tmp_path / "a.jpg") == (90, 60)
    assert images.load_bytes(tmp_path / "a.jpg").shape == (3, 90, 60)


# -- the order of samples --------------------------------------------------------------------------------------------


def simulated(bucket, size, seed, count):
    """The rule as it is said: passes in permutations, a queue for each bucket, a full queue is a micro-batch."""
    queues, found, epoch = {}, [], 0
    while len(found) < count:
        for row in torch.randperm(len(bucket), generator=generator(seed, "epoch", epoch)).tolist():
            queue = queues.setdefault(bucket[row], [])
            queue.append(row)
            if len(queue) == size:
                found.append(list(queue))
                queue.clear()
        epoch += 1
    return found[:count]


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("bucket", [[0] * 7, [0, 1, 0, 0, 2, 1, 0, 0, 1, 0, 0], [0, 1], list(range(9))])
def test_micro_batches_are_full_queues_of_the_buckets(bucket, size):
    expected = simulated(bucket, size, 5, 40)
    assert [micro_batch(torch.tensor(bucket), size, 5, number) for number in range(40)] == expected


def test_every_sample_is_seen_once_a_pass_but_for_those_that_wait():
    counts, size = [23, 10, 3, 1], 4
    bucket = torch.tensor([b for b, c in enumerate(counts) for _ in range(c)])
    for passes in (1, 2, 7, 12):
        whole = sum(passes * c // size for c in counts)  # as many as that many passes fill
        seen = Counter(row for number in range(whole) for row in micro_batch(bucket, size, 0, number))
        for which, c in enumerate(counts):
            rng = [seen[row] for row in (bucket == which).nonzero()[:, 0].tolist()]
            assert max(rng) - min(rng) <= 1 and passes * c - sum(rng) < size
            assert max(rng) <= passes and min(rng) >= passes - math.ceil((size - 1) / c)


def test_shares_of_a_micro_batch_are_the_micro_batch():
    rng = torch.Generator().manual_seed(0)
    shapes = [(4, 2, 3), (4, 3, 2), (4, 2, 3), (4, 2, 2), (4, 2, 3)]
    latents = LatentsInMemory([torch.randn(s, generator=rng) for s in shapes], [torch.ones(s) for s in shapes])
    samples = Samples(tuple("abcde"), latents)
    for number in range(6):
        whole = samples.batch(3, 1, number, 4)
        halves = [samples.batch(3, 1, number, 4, share) for share in (range(2), range(2, 4))]
        assert whole.prompts == halves[0].prompts + halves[1].prompts
        assert whole.rng.indices == halves[0].rng.indices + halves[1].rng.indices == tuple(range(4 * number, 4 * number + 4))
        assert torch.equal(whole.latents, torch.cat([half.latents for half in halves]))


# -- what is drawn has the batch's shape -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("sd15", UNetPolicy), ("sdxl", SDXLPolicy), ("sd3", SD3Policy), ("flux-dev", FluxPolicy)])
def test_a_policy_of_a_bucket_predicts_as_one_made_for_that_size(family, kind, family_folder):
    """Size conditioning and positions follow the states, not the size that the policy was made for."""
    square, made = kind.load(family_folder(family), image_size=64), kind.load(family_folder(family), image_size=(48, 80))
    x, sigma = torch.randn(2, *made.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    prompts = ["a red star", "a ring"]
    with torch.no_grad():
        found, expected = (policy.denoiser(prompts, guidance_scale=2.0)(x, sigma) for policy in (square, made))
    assert found.shape == (2, *made.latent_shape) and torch.equal(found, expected)


SMALL = {"steps": 4}
METHODS = {
    "refl": {**SMALL, "grad_from": 2, "grad_to": 3},
    "imagerefl": {**SMALL, "grad_from": 2, "grad_to": 3, "start_from": 1, "start_to": 2, "refl_share": 0.5},
    "draft-k": {**SMALL, "k": 2, "eta": 1.0},
    "draft-lv": SMALL,
    "alignprop": {**SMALL, "cut_mean": 2.0},
    "drtune": {**SMALL, "k": 2, "early_stop": 2},
    "flowbp-bridge": {**SMALL, "k": 3},
    "leapalign": SMALL,
    "direct-align": {**SMALL, "source": "offline"},
    "sqdf": {**SMALL, "buffer_gb": 0.001},
}


@pytest.mark.parametrize("name", METHODS)
def test_objectives_draw_at_the_size_of_the_batch(name, tmp_path):
    """All but SQDF, whose stored states must have one size."""
    seen = []

    class Brightness:
        differentiable = True

        def __call__(self, pictures, prompts):
            seen.append(tuple(pictures.shape[1:]))
            return pictures.mean((1, 2, 3))

    loss = OBJECTIVES[name](**METHODS[name]).begin(RunContext(Family(), Brightness(), folder=tmp_path))
    for number in range(2):
        latents = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        batch = batch_of(("a", "bb"), Rng(0, number, (2 * number, 2 * number + 1)), number, latents)
        value, logs = loss(batch)
        value.backward()
        assert torch.isfinite(value) and logs["reward"].shape == (2,)
    assert set(seen) == ({Family.latent_shape} if name == "sqdf" else {(3, 2, 5)})


# -- runs ------------------------------------------------------------------------------------------------------------


def toy(out, processes=ALONE, resume=False, stop=None):
    """A run on pictures of three shapes, one of them there twice; its weight."""
    run = toy_run("imagerefl with refl", out, processes)
    rng, shapes = torch.Generator().manual_seed(1), [(3, 1, 2), (3, 2, 1), (3, 1, 2), (3, 1, 1), (3, 1, 2)]
    mean = [0.5 * torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    which = torch.tensor([0, 1, 2, 3, 4, 4])
    run.samples = Samples(("a", "bb", "ccc", "dddd", "eeeee", "f"), LatentsInMemory(mean, [0.1 * torch.ones_like(m) for m in mean]), which)
    run.open_folder(overwrite=False, resume=resume)
    for done in run.steps():
        if done.number == stop:
            run.save()
            break
    return run.policy.weight.detach()


def toy_in_process(folder):
    with joined() as processes:
        torch.save(toy(folder / "two", processes), folder / f"{processes.rank}.pt")


def test_a_resumed_run_on_buckets_is_the_whole_one(tmp_path):
    whole = toy(tmp_path / "whole")
    toy(tmp_path / "cut", stop=3)
    assert torch.equal(toy(tmp_path / "cut", resume=True), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_two_processes_on_buckets_are_one(tmp_path):
    whole = toy(tmp_path / "one")
    assert finish(start(2, toy_in_process, tmp_path)) == [0, 0], said(tmp_path, 0)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-6, atol=1e-9)
    for here, there in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-6)
