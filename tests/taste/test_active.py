"""What to ask next."""

from __future__ import annotations

import pytest
import torch
from helpers.taste import random_design
from torch.nn import functional as F

from trainer.__main__ import main
from trainer.demo.files import load_tower
from trainer.rng import generator
from trainer.taste.active import expected, information, next_pairs, questions
from trainer.taste.head import Features


def test_information_is_that_of_a_simulation_and_none_where_the_answer_is_known():
    mean, variance = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    found, chance = information(mean, variance), expected(mean, variance)
    drawn = torch.sigmoid(mean[:2, None] + variance[:2, None].sqrt() * torch.randn(2, 200_000, generator=generator("information")))
    entropy = lambda p: -(p * p.log2() + (1 - p) * (1 - p).log2())  # noqa: E731
    assert torch.allclose(found[:2], entropy(drawn.mean(1)) - entropy(drawn).mean(1), atol=3e-3)
    assert torch.allclose(chance[:2], drawn.mean(1), atol=3e-3) and float(found[2]) < 1e-9


def test_the_next_question_is_about_what_is_not_known_and_not_twice_about_the_same():
    _, _, _, design = random_design(60, torch.tensor([3.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    axes = torch.eye(6, dtype=torch.float64)
    image = torch.cat([axes[:3], -axes[:3], F.normalize(axes[:1] + 0.01 * axes[3:4], dim=1)])
    features = Features(image, torch.zeros_like(image), torch.zeros(7, dtype=torch.float64))
    prompts = ["a", "b", "c", "a", "b", "c", "a"]  # pairs: a 0-3, 0-6, 3-6; b 1-4; c 2-5
    cold = questions(features, prompts, 5, None, 1.0)
    assert len({(q.first, q.second) for q in cold}) == 5 and [q.bits for q in cold] == sorted((q.bits for q in cold), reverse=True)
    assert {prompts[q.first] for q in cold[:3]} == {"a", "b", "c"}  # 3-6 is nearly 0-3 asked again
    told = questions(features, prompts, 5, design, 0.3)
    assert prompts[told[0].first] in "bc" and told[0].chance == pytest.approx(0.5, abs=0.25)


def test_images_of_several_sizes_are_not_compared():
    tower = load_tower("proxy")
    seen = F.normalize(
        torch.randn(6, 8 * 8, generator=generator("sizes"))[:, : tower.image_features(torch.rand(1, 3, 64, 64)).shape[1]], dim=1
    )
    sizes = [(3, 64, 64), (3, 48, 64), (3, 64, 64), (3, 48, 64), (3, 32, 32), (3, 32, 32)]
    found = next_pairs(tower, seen, ["p"] * 5 + ["q"], 9, None, apart=True, sizes=sizes)
    assert {frozenset((one.first, one.second)) for one in found} == {frozenset((0, 2)), frozenset((1, 3))}


def test_next_lists_pairs_of_one_prompt(judged, image_folder, capsys):
    folder = str(judged / "images")
    arguments = ["--tower", "demo-proxy", "--images", folder, "--prompt", "a large star", "-n", "4"]
    assert main(["taste", "next", str(judged / "choices.jsonl"), *arguments]) == 0
    lines = capsys.readouterr().out.partition("bits\t")[2].splitlines()
    bits = [float(line.split("\t")[0]) for line in lines[1:]]
    assert len(bits) == 4 and bits[0] > 0
    assert main(["taste", "next", *arguments]) == 0
