"""Metrics that need features of their own, and metrics over streams, against independent implementations and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.parity.pixels import natural_images
from tests.parity.weights import randomise
from trainer.metrics.dino import Dino
from trainer.metrics.distances import Moments, Reservoir, frechet_distance, log_covariance_distance, unbiased_mmd
from trainer.metrics.diversity import Diversity, pairwise_diversity, vendi_score, within_prompt_diversity
from trainer.metrics.lpips import Lpips

SMALL = {"size": 224, "patch": 32, "width": 48, "depth": 2, "heads": 3}


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3


@pytest.fixture
def dino(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=224,
        patch_size=32,
        layer_norm_eps=1e-6,
    )
    model = randomise(ViTModel(config), 1)
    model.save_pretrained(tmp_path)  # in the layout of the released files, whatever the names inside
    return tmp_path / "model.safetensors", model


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_dino_features_are_those_of_transformers(normalisation, mean, std, dino):
    path, model = dino
    images = torch.stack(natural_images([(224, 224)] * 3))
    pixels = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    ours = Dino.load(path, normalisation, architecture=SMALL)
    torch.testing.assert_close(ours(images), model(pixel_values=pixels).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
    assert ours.name == {"imagenet": "dino", "clip": "dino_clip_normalised"}[normalisation]


def test_dino_in_its_authors_layout_is_the_same(dino, tmp_path):
    path, _ = dino
    whole = Dino.load(path, architecture=SMALL)
    torch.save({**whole.model.state_dict()}, tmp_path / "dino.pth")
    images = torch.stack(natural_images([(224, 224)] * 2))
    torch.testing.assert_close(Dino.load(tmp_path / "dino.pth", architecture=SMALL)(images), whole(images))


@pytest.fixture
def lpips(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate((64, 192, 384, 256, 256))}
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    return Lpips.load(tmp_path / "alexnet.pth", tmp_path / "alex.pth"), network, heads


def test_lpips_is_the_paper_over_torchvisions_alexnet(lpips):
    ours, network, heads = lpips
    a, b = torch.stack(natural_images([(96, 80)] * 3)), torch.stack(natural_images([(96, 80)] * 3, 1))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = torch.zeros(3)
    for i in range(3):
        x, y = ((p[i : i + 1] - mean) / std for p in (a, b))
        layer = 0
        for module in network.features:
            x, y = module(x), module(y)
            if isinstance(module, torch.nn.ReLU):
                gap = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
                expected[i] += F.conv2d(gap, heads[f"lin{layer}.model.1.weight"]).mean()
                layer += 1
    torch.testing.assert_close(ours(a, b), expected, rtol=2e-3, atol=1e-5)  # the authors round ImageNet's mean and std
    assert ours(a, a).abs().max() < 1e-9
    torch.testing.assert_close(ours(a, b), ours(b, a))
    with pytest.raises(ValueError, match="at least 63 pixels"):
        ours(a[..., :40], b[..., :40])


def test_lpips_heads_of_another_network_are_refused(lpips, tmp_path):
    torch.save({"lin0.model.1.weight": torch.rand(1, 9, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg.pth does not hold AlexNet's LPIPS heads"):
        Lpips.load(tmp_path / "alexnet.pth", tmp_path / "vgg.pth")


def test_moments_of_a_stream_are_those_of_the_whole():
    whole = rows(50, 4)
    for parts in ([50], [1, 49], [7, 0, 20, 23]):
        moments = Moments()
        for part in whole.split(parts):
            moments.update(part)
        torch.testing.assert_close(moments.mean, whole.mean(0))
        torch.testing.assert_close(moments.covariance, whole.T.cov())
    far = rows(50, 4) + 1e8  # where sums of squares would lose every digit of the covariance
    torch.testing.assert_close(Moments().update(far[:20]).update(far[20:]).covariance, whole.T.cov(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="1 rows of features: give at least two"):
        _ = Moments().update(whole[:1]).covariance


def test_distances_of_streams_are_those_of_the_whole():
    a, b = rows(60, 5), rows(40, 5, 1) * 1.3
    streams = [Moments().update(x[:11]).update(x[11:]) for x in (a, b)]
    assert frechet_distance(*streams) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    units = [Moments().update(F.normalize(x[:11], dim=1)).update(F.normalize(x[11:], dim=1)) for x in (a, b)]
    assert log_covariance_distance(*units) == pytest.approx(log_covariance_distance(a, b), rel=1e-9)


def test_kernel_distance_is_the_double_loop_and_unbiased():
    a, b = rows(6, 3), rows(6, 3, 1) + 0.5

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs) / 30 - 2 * sum(k(x, y) for x in a for y in b) / 36
    assert unbiased_mmd(a, b) == pytest.approx(expected)
    same = [unbiased_mmd(rows(40, 3, 2 * s) - 3, rows(40, 3, 2 * s + 1) - 3) for s in range(200)]
    error = torch.tensor(same).std() / math.sqrt(200)
    assert abs(sum(same) / 200) < 4 * error and min(same) < 0  # its mean over equal distributions is 0: no bias
    with pytest.raises(ValueError, match="of one width"):
        unbiased_mmd(a, rows(6, 4))


def test_a_reservoir_is_a_uniform_sample_of_the_stream():
    hits = torch.zeros(20)
    for seed in range(2000):
        kept = Reservoir(5, torch.Generator().manual_seed(seed)).update(torch.arange(8.0)[:, None]).update(torch.arange(8.0, 20.0)[:, None])
        assert kept.rows.shape == (5, 1) and kept.seen == 20
        hits[kept.rows[:, 0].long()] += 1
    assert (hits / 2000 - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 2000)


def test_diversity_of_a_stream_groups_by_prompt_whatever_the_batches():
    features, groups = rows(12, 6), torch.tensor([0, 1, 2] * 4)
    whole = within_prompt_diversity(features, groups)
    stream = Diversity()
    for part in torch.randperm(12, generator=torch.Generator().manual_seed(3)).split(5):  # batches that mix prompts and split groups
        stream.update(features[part], groups[part].tolist())
    torch.testing.assert_close(torch.stack([stream.values()[g] for g in range(3)]), whole)
    with pytest.raises(ValueError, match="prompt x has 1 image"):
        Diversity().update(features[:1], ["x"]).values()


def test_pairwise_diversity_is_the_mean_over_pairs_of_a_prompt():
    images, groups = rows(7, 3), ["a", "b", "a", "b", "a", "b", "b"]
    found = pairwise_diversity(lambda x, y: (x - y).abs().sum(1), images, groups)
    for group in "ab":
        mine = [x for x, g in zip(images, groups) if g == group]
        gaps = [float((x - y).abs().sum()) for i, x in enumerate(mine) for y in mine[i + 1 :]]
        assert float(found[group]) == pytest.approx(sum(gaps) / len(gaps))


def test_vendi_counts_different_images():
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi_score(torch.cat([torch.eye(3)] * 4)) == pytest.approx(3)  # three images, each four times
    features = rows(9, 4) - 3
    unit = F.normalize(features, dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T / 9)
    expected = math.exp(-sum(float(v) * math.log(float(v)) for v in values if v > 1e-12))
    assert vendi_score(features) == pytest.approx(expected)


def test_an_image_that_does_not_count_takes_part_in_no_pair():
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    streamed = Diversity().update(features[:2], [0, 0], counts[:2]).update(features[2:], [0, 0, 0], counts[2:]).values()[0]
    unit = torch.nn.functional.normalize(features, dim=1)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(float(counts[i] * counts[j] * (1 - unit[i] @ unit[j])) for i, j in pairs) / len(pairs)
    assert float(streamed) == pytest.approx(expected, abs=1e-12)
    assert float(streamed) < float(Diversity().update(features, [0] * 5).values()[0])
