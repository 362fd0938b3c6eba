"""Watching a run: the rule for the best point and for the end, and what a run does with them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from trainer.config import ConfigError
from trainer.data.samples import Samples
from trainer.generate import Generation
from trainer.guidance import Switch
from trainer.lora.file import load_lora, read_lora
from trainer.metrics.distances import log_covariance_distance
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.training.config import TrainConfig, Watch
from trainer.training.evaluation import Evaluation, best_point, over_optimised
from trainer.training.parts import Parts
from trainer.training.run import Run


def point(step, reward, heldout, diversity=1.0):
    return {"step": float(step), "reward": reward, "heldout": heldout, "diversity": diversity}


RISE_AND_FALL = [point(0, 0.0, 0.0), point(5, 0.2, 0.3), point(10, 0.4, 0.2), point(15, 0.6, 0.1)]


def test_the_best_point_has_the_highest_held_out_reward_that_keeps_enough_diversity():
    assert best_point(RISE_AND_FALL, 0.0)["step"] == 5
    poor = [point(0, 0, 0, 0.4), point(5, 0, 0.3, 0.1), point(10, 0, 0.2, 0.3)]
    assert best_point(poor, 0.5)["step"] == 10
    assert best_point(poor, 1.0)["step"] == 0  # none keeps all of it: the point before training always does


def test_a_run_is_over_when_the_training_reward_rises_while_the_held_out_falls():
    assert [over_optimised(RISE_AND_FALL[:n], 0.0, 2) for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert over_optimised(RISE_AND_FALL[:3], 0.0, 1) and not over_optimised(RISE_AND_FALL, 0.0, 0)
    both_fall = [*RISE_AND_FALL[:2], point(10, 0.1, 0.2), point(15, 0.1, 0.1)]
    assert not over_optimised(both_fall, 0.0, 2)  # a bad stretch is no over-optimisation
    assert not over_optimised([*RISE_AND_FALL[:3], point(15, 0.6, 0.31)], 0.0, 1)


class Bright:
    differentiable = True

    def __call__(self, images, prompts):
        return 10 * images.flatten(1).mean(1)


class Dark(Bright):
    def __call__(self, images, prompts):
        return -super().__call__(images, prompts)


def watched_run(pipeline_folder, folder, heldout, **more):
    objective = {"name": "refl", "steps": 4, "grad_from": 2, "grad_to": 3}
    watch = Watch(every=1, heldout="of the test", count=1, images=2, patience=2, guidance_scale=1.0)
    config = TrainConfig(
        out=str(folder),
        objective=objective,
        watch=watch,
        lora=Lora(4, 4.0),
        batch_size=2,
        learning_rate=0.02,
        save_every=100,
        **{"steps": 8, **more},
    )
    policy = UNetPolicy.load(pipeline_folder)
    evaluation = Evaluation.of_run(config, policy, {"reward": Bright(), "heldout": heldout}, ["a star"], lambda x: x.flatten(1))
    return Run(config, Parts(policy, Samples(("a star", "a ring")), Bright(), evaluation=evaluation))


def test_a_run_stops_and_keeps_the_best(pipeline_folder, tmp_path):
    """The held-out judge dislikes exactly what is trained: the best adapter is none, and two points end the run."""
    run = watched_run(pipeline_folder, tmp_path / "a", Dark())
    run.open_folder(overwrite=False, resume=False)
    assert [s.number for s in run.steps()] == [1, 2]
    assert run.best["step"] == 0 and over_optimised(run.evaluation.points, 0.0, 2)
    points = json.loads((tmp_path / "a" / "watch.json").read_text())
    assert [p["step"] for p in points] == [0, 1, 2] and points[2]["reward"] > points[0]["reward"]
    assert read_lora(tmp_path / "a" / "best.safetensors")[1]["step"] == 0 and read_lora(tmp_path / "a" / "lora.safetensors")[1]["step"] == 2


def test_a_resumed_run_has_the_points_and_the_best_of_an_unbroken_one(pipeline_folder, tmp_path):
    for name in ("whole", "cut"):
        run = watched_run(pipeline_folder, tmp_path / name, Bright(), steps=3)
        run.open_folder(overwrite=False, resume=False)
        for step in run.steps():
            if name == "cut" and step.number == 2:
                run.save()
                break
    again = watched_run(pipeline_folder, tmp_path / "cut", Bright(), steps=3)
    again.open_folder(overwrite=False, resume=True)
    assert [s.number for s in again.steps()] == [3]
    texts = [(tmp_path / n / "watch.json").read_text() for n in ("whole", "cut")]
    assert texts[0] == texts[1]
    loaded = []
    for name in ("whole", "cut"):
        policy = UNetPolicy.load(pipeline_folder)
        load_lora(policy, tmp_path / name / "best.safetensors")
        loaded.append([p.detach() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*loaded))


def test_a_budget_of_denoiser_calls_ends_a_run(pipeline_folder, tmp_path):
    run = watched_run(pipeline_folder, tmp_path, Bright(), budget=30, steps=100)
    run.open_folder(overwrite=False, resume=False)
    log = [s for s in run.steps()]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["calls"] >= 30 and all(line["calls"] < 30 for line in lines[:-1]) and len(lines) == len(log)
    # two samples: rollouts of 2 or 3 steps, one call with gradient and its backward
    assert all(2 * (2 + 3) <= b["calls"] - a["calls"] <= 2 * (3 + 3) for a, b in itertools.pairwise(lines))
    assert all(line["calls"] - line["calls_without_gradient"] == 2 * 3 * line["step"] == 3 * line["images_decoded"] for line in lines)
    assert (tmp_path / "lora.safetensors").is_file()


def test_watching_without_a_judge_is_refused(pipeline_folder, tmp_path):
    config = TrainConfig(out=str(tmp_path), objective={"name": "refl"}, watch=Watch(every=5))
    with pytest.raises(ConfigError, match=r"watch\.heldout"):
        Run.start(config, Parts(UNetPolicy.load(pipeline_folder), Samples(("a",)), Bright()))


def test_settings_with_lists_in_them_resume(pipeline_folder, tmp_path):
    """A tuple comes back from a checkpoint as a list; that is no other setting."""
    objective = {"name": "srpo", "steps": 4, "sigma_low": 0.2, "sigma_high": 0.8, "positive": ("a", "b"), "negative": ["c"]}

    class Towers(Bright):
        takes_prefixes = True

        def scores(self, images, prompts, prefixes):
            return torch.stack([self(images, prompts) * len(p) for p in prefixes], 1)

    config = TrainConfig(out=str(tmp_path), objective=objective, steps=1, batch_size=1, lora=Lora(4, 4.0))
    runs = [Run(config, Parts(UNetPolicy.load(pipeline_folder), Samples(("a star",)), Towers())) for _ in range(2)]
    runs[0].open_folder(overwrite=False, resume=False)
    list(runs[0].steps())
    runs[1].open_folder(overwrite=False, resume=True)
    assert runs[1].step == 1


def test_an_evaluation_measures_fid_and_logcov_to_its_reference(pipeline_folder, caplog):
    """FID in one feature has a closed form: (μ−μ')² + (σ−σ')² (Heusel et al. 2017, eq. 6)."""
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(40, 3, 16, 16, generator=rng)
    policy = UNetPolicy.load(pipeline_folder)
    generation = Generation(steps=3, guidance_scale=1.0)

    def evaluate(features, reference):
        evaluation = Evaluation(policy, {"heldout": Bright()}, ["a star"] * 4, generation, Switch.parse("0"), features, reference=reference)
        return evaluation.run(0), evaluation.images

    def bright(x):
        return x.flatten(1).mean(1, keepdim=True)

    point, images = evaluate(bright, lambda: real.split(8))
    a, b = bright(images).double(), bright(real).double()
    assert point["fid"] == pytest.approx(float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2), rel=1e-9)
    assert not caplog.records  # four images for one feature

    def colours(x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    point, images = evaluate(colours, lambda: real.split(8))
    assert point["logcov"] == pytest.approx(log_covariance_distance(colours(images), colours(real)), rel=1e-9) and point["logcov"] > 0.1
    assert "FID and LogCov of 4 images in 6 features are biased upwards" in caplog.text
    again, _ = evaluate(colours, lambda: (part for part in real.split(5)))
    assert again["fid"] == pytest.approx(point["fid"], rel=1e-6)
    without, _ = evaluate(colours, None)
    assert set(point) - set(without) == {"fid", "logcov"}
    assert {name: point[name] for name in without} == without


@pytest.mark.parametrize(
    ("watch", "images", "count"),
    [
        ({}, "{images}", 8),
        ({"reference": "none"}, "{images}", None),
        ({}, "", None),
        ({"reference": "{images}"}, "", 8),
        ({}, "demo", 500),
    ],
)
def test_the_reference_is_the_training_images_or_a_folder(watch, images, count, image_folder):
    from trainer.commands.parts import reference

    def named(text):
        return text.replace("{images}", str(image_folder))

    config = TrainConfig(out="none", images=named(images), watch=Watch(**{key: named(value) for key, value in watch.items()}))
    found = reference(config, (16, 24))
    assert (found is None) == (count is None)
    if found is not None:
        batches = list(found())
        assert sum(map(len, batches)) == count and (images == "demo" or batches[0].shape[1:] == (3, 16, 24))


def test_a_reference_without_images_is_refused(tmp_path):
    from trainer.commands.parts import reference

    with pytest.raises(ConfigError, match=r"watch\.reference: FID and LogCov need at least two images, not 0"):
        reference(TrainConfig(out="none", watch=Watch(reference=str(tmp_path))), (16, 16))
