"""A comparison judged part by part: the figures of all images at once, whatever the parts; stopping; and how sure a figure is."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trainer.__main__ import main
from trainer.demo import files
from trainer.generate import Generation, generate
from trainer.guidance import cfg, combined
from trainer.metrics.distances import frechet_distance, log_covariance_distance, unbiased_mmd
from trainer.metrics.diversity import vendi_score, within_prompt_diversity
from trainer.metrics.intervals import jackknife
from trainer.metrics.streaming import BLOCKS, FeatureStatistics, distances
from trainer.metrics.study import BASE, Judges, Study

PROMPTS = ["a", "b", "c", "d", "a", "e"] * 2  # "a" has four images, the others two
GROUPS = torch.tensor([0] * 4 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2)
POINT = ("mine", 3)


def _mmd_by_loops(a, b):
    """KID's estimator, pair by pair."""

    def k(x, y):
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    def within(rows):
        return sum(k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j) / (len(rows) * (len(rows) - 1))

    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


class Mean:
    differentiable = True

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        return images.flatten(1).mean(1)


def half(images):
    return images.flatten(1)[:, :6]


def gap(a, b):
    return (a - b).abs().flatten(1).mean(1)


def study(folder, **settings):
    judges = Judges({"mean": Mean()}, {"flat": lambda images: images.flatten(1), "half": half}, gap)
    return Study(folder, PROMPTS, [POINT], judges, {"seed": 1, **settings})


def drawn(numbers, point):
    """Images (N,3,2,2); image i is a function of its number alone."""
    images = torch.stack([torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in numbers])
    return images if point == BASE else (images + 0.2).sqrt()


def run(mine, size):
    for part in mine.parts(size):
        numbers = range(part.first, part.first + len(part.prompts))
        mine.add(part, {point: drawn(numbers, point) for point in mine.points})


def finished(folder, size):
    mine = study(folder)
    mine.open(resume=False, overwrite=False)
    run(mine, size)
    return mine


@pytest.mark.parametrize(("size", "lengths"), [(1, [4, 2, 2, 2, 2]), (5, [6, 6]), (100, [12])])
def test_parts_have_whole_prompts_and_every_image_once(size, lengths, tmp_path):
    parts = list(study(tmp_path).parts(size))
    assert [len(p.prompts) for p in parts] == lengths and [p.first for p in parts] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert "".join(prompt for p in parts for prompt in p.prompts) == "aaaabbccddee"


@pytest.mark.parametrize("size", [1, 100])
def test_figures_are_those_of_all_images_at_once_whatever_the_parts(size, tmp_path):
    results = finished(tmp_path, size).summarise()
    base, mine = (drawn(range(12), point).double() for point in (BASE, POINT))
    for found, images in ((results["base"], base), (results["points"][0], mine)):
        for name, seen in (("", images.flatten(1)), ("half_", half(images))):
            groups = [seen[g == GROUPS] for g in range(5)]
            assert found[name + "diversity"] == pytest.approx(float(within_prompt_diversity(seen, GROUPS).mean()), rel=1e-5)
            assert found[name + "vendi"] == pytest.approx(sum(map(vendi_score, groups)) / 5, rel=1e-5)
        assert found["mean"] == pytest.approx(sum(float(images[g == GROUPS].mean()) for g in range(5)) / 5, rel=1e-5)
        pairs = [
            [float(gap(x[None], y[None])) for i, x in enumerate(r) for y in r[i + 1 :]] for r in (images[g == GROUPS] for g in range(5))
        ]
        assert found["lpips_diversity"] == pytest.approx(sum(sum(p) / len(p) for p in pairs) / 5, rel=1e-5)
    for name, a, b in (("", mine.flatten(1), base.flatten(1)), ("half_", half(mine), half(base))):
        assert results["points"][0][name + "fid"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
        assert results["points"][0][name + "logcov"] == pytest.approx(log_covariance_distance(a, b), rel=1e-4)
        assert results["points"][0][name + "kid"] == pytest.approx(_mmd_by_loops(a, b), rel=1e-4)
    assert results["base"]["fid"] == pytest.approx(0, abs=1e-6) and "kid" not in results["base"]
    assert results["features"] == ["flat", "half"]


def test_intervals_hold_the_figure_and_the_difference_to_the_base(tmp_path):
    mine = finished(tmp_path, 5)
    real = {"flat": [rows(20, 12), rows(30, 12, 1)], "half": [rows(50, 6, 2)]}
    for results in (mine.summarise(), mine.summarise(real)):
        (point,), (difference,) = results["points"], results["ci"]
        base, absolute = results["ci_absolute"]
        assert (difference["model"], difference["k"], absolute["model"], base["model"]) == ("mine", 3, "mine", "base")
        for name in ("mean", "diversity", "half_vendi", "lpips_diversity", "fid", "kid", "half_logcov"):
            assert absolute[name][0] <= point[name] <= absolute[name][1]
            gained = point[name] - results["base"].get(name, 0.0)
            assert difference[name][0] <= gained <= difference[name][1]
    assert base["kid"][0] <= results["base"]["kid"] <= base["kid"][1] and results["reference"] == "real images"
    assert results["base"]["half_fid"] == pytest.approx(frechet_distance(half(drawn(range(12), BASE)), rows(50, 6, 2)), rel=1e-4)


def test_a_stopped_study_goes_on_at_the_next_part_and_refuses_another(tmp_path):
    whole = finished(tmp_path / "whole", 1).summarise()
    mine = study(tmp_path / "x")
    mine.open(resume=False, overwrite=False)
    for part in list(mine.parts(1))[:2]:
        mine.add(part, {point: drawn(range(part.first, part.first + len(part.prompts)), point) for point in mine.points})
    (tmp_path / "x" / "000002.partial").write_bytes(b"torn")
    with pytest.raises(ValueError, match="interrupted evaluation: add --resume to continue it"):
        study(tmp_path / "x").open(resume=False, overwrite=False)
    with pytest.raises(ValueError, match="was started with different seed"):
        study(tmp_path / "x", seed=2).open(resume=True, overwrite=False)
    again = study(tmp_path / "x")
    again.open(resume=True, overwrite=False)
    assert [p.number for p in again.parts(1)] == [2, 3, 4]
    run(again, 1)
    assert again.summarise() == whole
    again.clear()
    assert not (tmp_path / "x").exists()


def test_only_a_studys_own_files_are_deleted_and_chunks_without_settings_are_not_taken_over(tmp_path):
    folder = tmp_path / "x.parts"
    folder.mkdir()
    for name in ("mine.safetensors", "0001.safetensors"):
        (folder / name).write_bytes(b"mine")
    mine = study(folder)
    mine.open(resume=False, overwrite=True)
    run(mine, 4)
    (folder / "settings.json").unlink()  # deleting was interrupted
    other = study(folder, seed=2)
    other.open(resume=True, overwrite=False)
    assert sorted(p.name for p in folder.iterdir()) == ["0001.safetensors", "mine.safetensors", "settings.json"]
    (folder / "settings.json").write_text('{"seed"')
    with pytest.raises(ValueError, match="settings.json is damaged: add --overwrite"):
        other.open(resume=True, overwrite=False)
    other.clear()
    assert sorted(p.name for p in folder.iterdir()) == ["0001.safetensors", "mine.safetensors"]


def test_a_prompt_of_one_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt 'b' has 1 image"):
        Study(tmp_path, ["a", "a", "b"], [POINT], Judges({}, {}), {})


# -- how sure a distance is ------------------------------------------------------------------------------------------


def test_a_cloud_without_a_block_is_the_cloud_of_the_other_prompts():
    a, b, prompts = rows(60, 4), rows(45, 4, 1) * 1.2, [i // 2 for i in range(60)]
    cloud, reference = FeatureStatistics(), FeatureStatistics().update(b, [0] * 45)
    for part in torch.arange(60).split(7):
        cloud.update(a[part], [prompts[i] for i in part.tolist()])
    assert cloud.blocks == list(range(BLOCKS))
    for block in (None, 3):
        kept = a if block is None else a[torch.tensor(prompts) % BLOCKS != block]
        found = distances(cloud, reference, block)
        assert found["fid"] == pytest.approx(frechet_distance(kept, b), rel=1e-9)
        assert found["logcov"] == pytest.approx(log_covariance_distance(kept, b), rel=1e-9)
        assert found["kid"] == pytest.approx(unbiased_mmd(kept, b), rel=1e-9)


def test_the_jackknife_of_a_mean_is_the_textbook_interval():
    values = rows(10, 1)[:, 0]

    def mean(block):
        return {"mean": float(values.mean() if block is None else torch.cat([values[:block], values[block + 1 :]]).mean())}

    centre, half_width = float(values.mean()), 2.262 * float(values.std()) / math.sqrt(10)  # Student's t, 9 degrees of freedom
    assert jackknife(mean, range(10))["mean"] == pytest.approx([centre - half_width, centre + half_width], rel=1e-3)
    assert jackknife(mean, [0]) == {}


def test_intervals_of_a_distance_cover_it():
    """FID between samples of two Gaussians: most intervals hold the mean over many samples."""
    rng = [rows(200, 3, seed) * 1.3 for seed in range(40)]
    reference = FeatureStatistics().update(rows(300, 3, 99), [0] * 300)
    clouds = [FeatureStatistics().update(d, [i // 4 for i in range(200)]) for d in rng]
    values = [distances(c, reference)["fid"] for c in clouds]
    expected = sum(values) / len(values)
    hits = 0
    for cloud in clouds:
        low, high = jackknife(lambda block, cloud=cloud: distances(cloud, reference, block), cloud.blocks)["fid"]
        hits += low <= expected <= high
    assert hits >= 34  # 95 % of 40 is 38; fewer than 34 has a chance of one in a hundred


# -- from models to figures ------------------------------------------------------------------------------------------


def test_images_drawn_in_parts_are_those_drawn_at_once(policy):
    prompts, settings = ["a red star", "a blue ring", "a red star"], Generation(steps=2, guidance_scale=2.0, chunk=2)
    mixes = {"tuned": combined(settings.base, settings.tuned(), 1), "base": cfg(settings.base)}
    whole, rest = generate(policy, prompts, settings, mixes), generate(policy, prompts[1:], settings, mixes, first=1)
    for name in mixes:
        torch.testing.assert_close(rest[name], whole[name][1:], atol=1e-5, rtol=0)
    assert (generate(policy, prompts[2:], settings, mixes)["base"] - whole["base"][2:]).abs().max() > 1e-3


@pytest.mark.slow
def test_evaluate_judges_by_everything_that_is_at_hand_and_goes_on_after_a_stop(tmp_path, monkeypatch, image_folder):
    from trainer.metrics import study as module

    lora = files.loras()["demo-refl"]
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na red star\n")
    out = tmp_path / "judged.json"
    command = ["evaluate", "--lora", f"mine={lora}", "--prompts", str(tmp_path / "prompts.txt"), "-n", "2", "--steps", "4"]
    command += ["--reward", "demo-heldout", "--switches", "0,3", "--chunk", "2", "--real", str(image_folder), "--out", str(out)]
    add, added = module.Study.add, []

    def stop_at_second(self, part, images):
        if len(added) == 1:
            added.append(None)
            raise KeyboardInterrupt
        added.append(part.number)
        add(self, part, images)

    monkeypatch.setattr(module.Study, "add", stop_at_second)
    assert main(command) == 130
    assert main(command) == 2 and not out.exists()
    assert main([*command, "--resume"]) == 0
    assert added == [0, None, 1]  # four images of the prompt given twice, then two of the other
    results = json.loads(out.read_text())
    assert not (tmp_path / "judged.json.parts").exists()
    assert [(p["model"], p["k"]) for p in results["points"]] == [("mine", 0), ("mine", 3)]
    assert {"demo-heldout", "diversity", "vendi", "fid", "kid", "logcov", "demo-heldout_diversity"} <= results["base"].keys()
    assert results["base"].keys() | {"model", "k"} == results["points"][1].keys() and results["config"]["n"] == 6
    assert {"diversity", "fid", "demo-heldout_kid"} <= results["ci"][1].keys() and results["ci_absolute"][0]["model"] == "base"


@pytest.mark.full  # roots of 2048 × 2048 matrices
def test_evaluate_takes_raw_scores_of_rewards_without_statistics_and_the_published_fid(tmp_path, capsys):
    from helpers.inception import random_state

    torch.save(random_state(), tmp_path / "inception.pth")
    (tmp_path / "own.py").write_text("def reward(images, prompts):\n    return 100 * images.mean((1, 2, 3))\n")
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    out = tmp_path / "judged.json"
    command = ["evaluate", "--lora", f"mine={files.loras()['demo-refl']}", "--prompts", str(tmp_path / "prompts.txt"), "-n", "2"]
    command += ["--steps", "2", "--switches", "0", "--reward", str(tmp_path / "own.py"), "--out", str(out)]
    assert main(command) == 2
    assert "no mean and standard deviation are known" in capsys.readouterr().err
    assert main([*command, "--raw", "--inception", str(tmp_path / "inception.pth")]) == 0
    results = json.loads(out.read_text())
    point = results["points"][0]
    assert 5 < point[str(tmp_path / "own.py")] < 95 and results["config"]["raw"] is True  # hundredths of full brightness, not deviations
    assert point["fid_inception"] > 1 and results["base"]["fid_inception"] == pytest.approx(0, abs=1e-3)
    assert {"inception", str(tmp_path / "own.py")} <= results["weights"].keys()
    assert "fid_inception has 2048" in capsys.readouterr().err
