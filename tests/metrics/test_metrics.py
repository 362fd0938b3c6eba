"""Metrics against closed forms and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.metrics.distances import frechet_distance, log_covariance_distance
from trainer.metrics.diversity import within_prompt_diversity
from trainer.metrics.intervals import bootstrap, dominated_area
from trainer.metrics.summary import Judged, frontier_area, frontier_point, intervals


def gaussian(n, d, seed, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Isotropic Gaussians: d·(m² + (s−1)²)."""
    a, b = gaussian(200_000, 4, 0), gaussian(200_000, 4, 1, mean=0.5, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(4 * (0.25 + 1.0), rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)


def test_frechet_distance_equals_torchs_matrix_square_root_route():
    a, b = gaussian(500, 6, 2) @ gaussian(6, 6, 3), gaussian(400, 6, 4) @ gaussian(6, 6, 5)
    ca, cb = a.T.cov(), b.T.cov()
    eigenvalues = torch.linalg.eigvals(ca @ cb)  # the trace of (Ca Cb)^½ from the eigenvalues of the product itself
    expected = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * eigenvalues.real.clamp(min=0).sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_log_covariance_distance_is_zero_on_itself_and_grows_as_a_set_collapses():
    a = gaussian(2000, 5, 0)
    collapsed = a * torch.tensor([1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    slightly = a * torch.tensor([1, 0.7, 0.7, 0.7, 0.7], dtype=torch.float64)
    assert log_covariance_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert 0 < log_covariance_distance(slightly, a) < log_covariance_distance(collapsed, a)


def test_diversity_equals_the_plain_double_loop_and_ignores_order():
    features, groups = gaussian(12, 7, 0), torch.tensor([0, 1, 2] * 4)
    expected = []
    for g in range(3):
        rows = [f / f.norm() for f in features[groups == g]]
        cosines = [float(a @ b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
        expected.append(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(within_prompt_diversity(features, groups), torch.tensor(expected, dtype=torch.float64))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(within_prompt_diversity(features[order], groups[order]), torch.tensor(expected, dtype=torch.float64))


def test_diversity_of_one_image_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has 1 image"):
        within_prompt_diversity(torch.randn(3, 4), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("points", "area"),
    [([(1, 0)], 0.0), ([(0.5, 2.0)], 1.0), ([(1, 1), (0.5, 2)], 1.5), ([(1, 1), (0.5, 0.5)], 1.0), ([(1, -1), (-1, 3)], 0.0), ([], 0.0)],
)
def test_dominated_area_by_hand(points, area):
    assert dominated_area(points) == pytest.approx(area)


def test_bootstrap_covers_a_normal_mean():
    values = gaussian(400, 1, 0)[:, 0]
    low, high = bootstrap(lambda rows: values[rows].mean(), 400)
    half = 1.96 / math.sqrt(400)
    assert float(high - low) / 2 == pytest.approx(half, rel=0.15)
    assert float(low) < float(values.mean()) < float(high)


def test_figures_pair_by_prompt_and_the_base_is_the_origin_of_the_frontier():
    rewards, diversity = gaussian(30, 1, 1)[:, 0], gaussian(30, 1, 2, mean=1.0, scale=0.1)[:, 0]
    base, brighter = Judged({"mean": rewards}, diversity), Judged({"mean": rewards + 0.2}, 0.8 * diversity)
    assert brighter.means() == pytest.approx({"mean": float(rewards.mean()) + 0.2, "diversity": 0.8 * float(diversity.mean())})
    assert frontier_point(base, base, "mean") == (1.0, 0.0)
    x, y = frontier_point(brighter, base, "mean")
    assert (x, y) == pytest.approx((0.8, 0.2 / float(rewards.std())))
    assert frontier_area([brighter], base, "mean") == pytest.approx(x * y)
    assert intervals(brighter, base)["mean"] == pytest.approx([0.2, 0.2])  # paired: the difference is constant
    low, high = intervals(brighter)["mean"]
    assert high - low == pytest.approx(2 * 1.96 * float(rewards.std()) / math.sqrt(30), rel=0.2)
