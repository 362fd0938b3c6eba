"""The comparison: every method trains on the embedded model, the page and the figures are whole, a second call only judges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools.embedded import tables
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.demo import charts, compare, experiment, files, pairs
from trainer.demo.compare import METHODS, Size
from trainer.objectives.preference.perturb import perturb
from trainer.policy import Lora
from trainer.rng import generator
from trainer.runtime.files import file_hash

TINY = Size(budget=60, batch=2, prompts=2, per_prompt=2, watched=1, points=1, real=8)


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown method 'reflx'.*sqdf"):
        compare.compare(["reflx"], tmp_path, TINY, 0)


def test_methods_are_named_one_by_one_or_by_what_they_learn_from():
    assert compare.names_of(["pairs", "mapo", "refl"]) == [
        "diffusion-dpo",
        "dspo",
        "dmpo",
        "inpo",
        "smpo",
        "diffusion-npo",
        "chats",
        "mapo",
        "better-images",
        "refl",
    ]
    assert compare.names_of(["all"]) == list(METHODS)
    with pytest.raises(ConfigError, match="unknown method 'pair': use some of refl.*; or all, reward, pairs, labels, good, images$"):
        compare.names_of(["pair"])


def test_a_method_trains_on_the_data_that_its_objective_asks_for(tmp_path):
    for name, method in METHODS.items():
        config = compare.train_config(name, tmp_path, TINY, 0)
        given = {key for key in ("images", "pairs", "labels") if getattr(config, key)}
        assert given == {method.data if method.data in ("pairs", "labels") else "images"}, name
        assert config.method.needs_reward == (method.data == "reward" or name == "smpo"), name  # whose reward labels the pairs


def test_every_method_has_settings_that_its_objective_takes(tmp_path):
    for name in METHODS:
        compare.train_config(name, tmp_path, TINY, 0)
        assert charts.title(name) and charts.title(f"{name} best")


def test_a_finished_run_with_other_settings_is_refused(tmp_path, monkeypatch):
    """It is kept as it is, so that other settings would silently get its LoRA."""

    def finish(config):
        folder = Path(config.out)
        folder.mkdir(parents=True)
        metadata = {"imagerefl": json.dumps({"settings": config.describe(), "base": base, "weights": {}})}
        save_file({"x.lora_down.weight": torch.zeros(1, 1)}, folder / "lora.safetensors", metadata)
        (folder / "watch.json").write_text('[{"step": 0}]')

    def train(config):
        return experiment.train(config, None, ["a red star"], {})

    base = file_hash(files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    config = compare.train_config("refl", tmp_path / "refl", replace(TINY, points=3), 0)
    finish(config)
    assert train(config) == [{"step": 0}]
    assert train(replace(config, save_every=7, out=f"{config.out}/")) == [{"step": 0}]  # what does not decide the result
    with pytest.raises(ConfigError, match=r"^\S+refl was trained with another seed: 0, now 1; give another output folder$"):
        train(replace(config, seed=1))
    with pytest.raises(ConfigError, match=r"another budget: 60, now 400;"):
        train(replace(config, budget=400))
    with pytest.raises(ConfigError, match=r"another objective\.grad_from: 12, now 10;"):
        train(replace(config, objective={**config.objective, "grad_from": 10}))
    monkeypatch.setattr(experiment, "renders", lambda n, seed: pytest.fail("a method was trained"))
    finish(replace(config, out=str(tmp_path / "out" / "runs" / "refl")))
    with pytest.raises(ConfigError, match="another budget: 60, now 400;"):
        compare.compare(["draft-lv", "refl"], tmp_path / "out", replace(TINY, budget=400, points=3), 0)


@pytest.mark.slow
def test_methods_are_trained_judged_and_left_alone_the_second_time(tmp_path, monkeypatch):
    names = ["srpo", "sqdf"]
    results = compare.compare(names, tmp_path, TINY, 0, quick=True)
    assert list(results["curves"]) == names and results["n"] == 4
    assert {(p["model"], p["k"]) for p in results["points"]} == {(f"{n}{b}", k) for n in names for b in ("", " best") for k in (0, 12)}
    assert {"base", "base_unguided", "points", "frontier", "seed", "n", "ci", "config", "curves", "seconds", "peak_rss_mb"} <= set(results)
    assert all(c["calls"] >= TINY.budget and c["calls_without_gradient"] < c["calls"] for c in results["cost"].values())
    assert all(c["images_decoded"] >= 2 * c["steps"] for c in results["cost"].values()) and "kl" in results["cost"]["sqdf"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64") == 2 + 2 + 2 * len(names) and "SRPO" in page and "quick comparison" in page
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["points"] == results["points"]

    logs = {name: (tmp_path / "runs" / name / "log.jsonl").read_text() for name in names}
    again = compare.compare(names, tmp_path, TINY, 0)
    assert again["points"] == results["points"]
    assert logs == {name: (tmp_path / "runs" / name / "log.jsonl").read_text() for name in names}
    tables.write([tmp_path, tmp_path], tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert (tmp_path / "tables-frontier.png").is_file() and (tmp_path / "tables-curves.png").is_file()
    assert "| SRPO best | 12 |" in text and "| SQDF | proxy |" in text


@pytest.mark.slow
def test_held_out_pairs_and_captions_are_preferred_by_hand_as_counted():
    """One denoiser call for each image and level, in ε, against the function's batches; an adapter that repeats the base prefers none."""
    policy, draws = experiment.load_base(), 2
    policy.add_lora(Lora(rank=2, alpha=2.0), 0)
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.normal_(0, 0.1, generator=generator(3, "adapter", i))
    better, worse, texts = pairs.rated_pairs(4, 1, "held-out pairs")
    wrong = [perturb(text) for text in texts]
    noise = torch.randn((draws, 4, *policy.latent_shape), generator=generator(1, "held-out pairs"))

    def gain(image, text, i):
        """Errors of the base less those of the adapter."""
        x0, total = policy.encode(image[None])[0], 0.0
        for draw, sigma in enumerate(policy.sigmas(draws + 1)[1:-1]):
            x, level = x0 + sigma * noise[draw, i], sigma.reshape(1)
            base, tuned = (float(((policy.denoiser([text], adapter=a)(x, level) - x0) / sigma).square().mean()) for a in ("base", "tuned"))
            total += base - tuned
        return total

    found = pairs.pairs_preferred(policy, ["tuned", "base"], 4, draws)
    assert not found["base"].any()
    for i, text in enumerate(texts):
        assert bool(found["tuned"][i]) == (gain(better[i], text, i) > gain(worse[i], text, i)), text
    found = pairs.captions_preferred(policy, ["tuned", "base"], 4, draws)
    assert not found["base"].any() and len({*texts, *wrong}) == 8
    for i, text in enumerate(texts):
        assert bool(found["tuned"][i]) == (gain(better[i], text, i) > gain(better[i], wrong[i], i)), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft-k", "drtune", "direct-align"])
def test_one_update_of_a_method_moves_every_adapter(name, tmp_path):
    from safetensors.torch import load_file

    samples = experiment.renders(4, 0)
    config = replace(compare.train_config(name, tmp_path, TINY, 0), budget=1)
    experiment.train(config, samples, ["a red star"], compare.rewards())
    lora = load_file(tmp_path / "lora.safetensors")
    assert all(float(v.abs().max()) > 0 for k, v in lora.items() if k.endswith("lora_up.weight"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mapo", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["mapo", "ddpo", "--budget", "700"], "--budget 700: a step of ddpo takes about 1024 denoiser calls: give at least that"),
        (["mapoo"], "unknown method 'mapoo': did you mean mapo?"),
        (["mapo", "--out", "file"], "--out file is a file: give a folder"),
        (["mapo", "--out", "mine"], "--out mine holds something else than a comparison: give another folder"),
        (["mapo", "--out", "file/below"], "cannot write to file/below: [Errno 20] Not a directory"),
    ],
)
def test_what_no_comparison_can_come_of_is_refused_before_anything_is_rendered(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "samples_of", lambda *_: pytest.fail("rendered"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    assert main(["compare", *arguments, *(() if "--out" in arguments else ("--out", "new"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists() and (tmp_path / "mine" / "report.html").read_text() == "mine"
