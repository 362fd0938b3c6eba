"""The demo on the shipped weights, as small as it goes: every file and key it promises."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tools.embedded import gates
from trainer.demo import experiment, files, show, verdict, world
from trainer.metrics.distances import frechet_distance
from trainer.metrics.frontier import Curves
from trainer.runtime.files import file_hash

DISTANCES = {"diversity", "vendi", "fid", "kid", "logcov"}
FIGURES = {"reward", "heldout", "gold", "match", *DISTANCES, *(f"reader_{name}" for name in DISTANCES)}


def test_the_shipped_files_are_those_of_the_manifest_and_small():
    manifest = json.loads((files.FOLDER / "manifest.json").read_text())
    found = {str(p.relative_to(files.FOLDER)): p for p in files.FOLDER.rglob("*.safetensors")}
    assert {name: file_hash(path) for name, path in found.items()} == manifest["sha256"]
    assert sum(p.stat().st_size for p in files.FOLDER.rglob("*") if p.is_file()) <= 17_300_000
    assert found["extractor.safetensors"].stat().st_size <= 800_000


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "QUICK", show.DemoSize(updates=2, batch=4, prompts=5, per_prompt=4, switches=(0, 12, 16), real=8, watched=2))
    results = show.show(tmp_path / "demo", quick=True)
    on_disk = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert on_disk.keys() >= {
        "base",
        "base_unguided",
        "points",
        "frontier",
        "seed",
        "n",
        "ci",
        "config",
        "claim",
        "curves",
        "seconds",
        "peak_rss_mb",
    }
    assert set(on_disk["base"]) == set(on_disk["base_unguided"]) == FIGURES
    assert [(p["model"], p["k"]) for p in on_disk["points"]] == [(m, k) for m in ("refl", "imagerefl") for k in (0, 12, 16)]
    assert all(set(p) == FIGURES | {"model", "k"} for p in on_disk["points"])
    assert set(on_disk["frontier"]) == {"refl", "imagerefl"} and on_disk["n"] == 20
    for name in ("refl", "imagerefl"):
        assert load_file(tmp_path / "demo" / f"{name}.safetensors")

    class Page(HTMLParser):
        sources: list[str] = []

        def handle_starttag(self, tag, attrs):
            values = dict(attrs)
            self.sources += [values[k] for k in ("src", "href") if k in values]

    page = (tmp_path / "demo" / "report.html").read_text()
    Page().feed(page)
    assert len(Page.sources) == 4 * 4 + 2 + 1 and all(s.startswith("data:image/png;base64,") for s in Page.sources)  # one file, no network
    assert "The quick demo" in page and "Ran on the CPU with the embedded model" in page and "Not run: any GPU" in page
    assert verdict.run_sentence(on_disk["claim"]) in html.unescape(page)
    assert verdict.experiment_sentence(verdict.load(), on_disk["claim"]["direction"], 5) in html.unescape(page)
    curves = Curves(on_disk["per_prompt"])
    assert on_disk["claim"]["leads"]["gold"] == pytest.approx(list(curves.lead(["imagerefl"], ["refl"], "gold")))
    for name, size in (("overview", (4 * 524 + 3 * 36, 92 + 4 * 132)), ("overview-narrow", (524, 4 * (44 + 132)))):
        image = Image.open(tmp_path / "demo" / f"{name}.png")
        assert image.size == size and image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0  # no ground: for light and dark
    with pytest.raises(ValueError, match="add --overwrite"):
        show.show(tmp_path / "demo", quick=True)
    again = show.show(tmp_path / "demo", quick=True, resume=True)  # trained already: the same figures come out
    assert again["points"] == results["points"]
    with pytest.raises(ValueError, match="was trained with another seed: 0, now 1"):
        show.show(tmp_path / "demo", quick=True, resume=True, seed=1)


@pytest.mark.slow
def test_distances_are_to_renders_under_the_same_features(tmp_path):
    captions = world.captions(4, "test distances")
    found = experiment.evaluate(tmp_path, experiment.load_base(), {}, captions, 4, experiment.rewards(), 0)
    real = world.real_renders(captions, 16, 1)
    for prefix, network in (("", files.load_extractor()), ("reader_", files.load_reader())):
        ours, theirs = network.features(found.images[experiment.BASE]), network.features(real)
        assert found.summary["base"][f"{prefix}fid"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-4)


@pytest.mark.slow
def test_the_reader_reads_renders_and_reconstructions():
    policy = experiment.load_base()
    measured = gates.reconstruction(policy, files.load_reader(), world.captions(200, "test gates"))
    assert measured["psnr"] > 28
    assert measured["renders"]["joint"] > 0.95


@pytest.mark.slow
def test_preference_models_prefer_what_the_rater_prefers():
    """On fresh renders that differ in finish and layout alone."""
    captions = world.captions(60, "test preference")
    a, b = (world.real_renders(captions, 1, seed) for seed in (1, 2))
    texts = [c.text for c in captions]
    rewards = experiment.rewards()
    with torch.no_grad():
        gaps = {name: r(a, texts) - r(b, texts) for name, r in rewards.items()}
    for name in ("reward", "heldout"):
        assert float((gaps[name].sign() == gaps["gold"].sign()).float().mean()) > 0.65


def test_normalised_rewards_have_unit_scale_on_renders():
    captions = world.captions(64, "test scale")
    images = world.real_renders(captions, 1, 1)
    with torch.no_grad():
        scores = files.load_reward("proxy")(images, [c.text for c in captions])
    assert 0.3 < float(scores.std()) < 3
    assert torch.isfinite(scores).all()
