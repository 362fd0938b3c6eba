"""A run resumes with the data that it began with, known by their content, wherever they lie; anything else is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from trainer.config import ConfigError, build
from trainer.data.samples import load_samples
from trainer.training.config import TrainConfig
from trainer.training.folder import check_resumable

STATE = {"step": 1, "adapter": {}, "optimizer": {}, "ema": {}, "objective": {}, "points": [], "calls": 0, "base": "", "weights": {}}


class Encoder:
    """Latents that are the pixels."""

    def encode(self, images):
        return images, torch.zeros_like(images)

    def latents_depend_on(self):
        return "pixels"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of three captioned images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(f"a {name} star")
    return tmp_path / "set"


def data_of(images="", prompts=""):
    return {"images" if images else "prompts": load_samples(Encoder(), prompts, images, [(8, 8)]).fingerprint}


def config(**settings):
    return build(TrainConfig, {"out": "run", **settings})


def check(before, then, now, *, state=STATE, weights=None):
    """Resume a run of the settings `before` and the data `then` with the settings and data of `now`."""
    settings, found = now
    state = {**state, "settings": json.dumps(before.describe()), **({} if then is None else {"data": then})}
    check_resumable(config(**settings), state, "", weights or {}, found, ())


def change_caption(data):
    (data / "blue.txt").write_text("something else")


def change_image(data):
    Image.new("RGB", (8, 8), "black").save(data / "blue.png")


def add_image(data):
    Image.new("RGB", (8, 8), "yellow").save(data / "aaa.png")
    (data / "aaa.txt").write_text("a yellow star")


def rename_image(data):  # the order decides which sample a step draws
    for suffix in (".png", ".txt"):
        (data / "blue").with_suffix(suffix).rename((data / "zzz").with_suffix(suffix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_caption, "images = set: other captions; go on with those that the run began with"),
        (change_image, "images = set: other images;"),
        (add_image, "images = set: 3 images, now 4;"),
        (rename_image, "images = set: other images and captions;"),
    ],
)
def test_other_images_and_captions_are_refused(data, change, message):
    before = config(images="set"), data_of("set")
    change(data)
    with pytest.raises(ConfigError, match=f"written with other data, {message}"):
        check(*before, ({"images": "set"}, data_of("set")))


def test_data_of_the_same_content_are_the_same_wherever_they_lie(data):
    before = config(images="set"), data_of("set")
    shutil.copytree(data, data.parent / "moved")
    (data.parent / "link").symlink_to(data)
    for path in ("set", "set/", str(data), "link", "moved"):
        check(*before, ({"images": path}, data_of(path)))


def test_other_prompts_are_refused(data):
    path = data.parent / "prompts.txt"
    path.write_text("a red star\na blue star\n")
    before = config(prompts="prompts.txt"), data_of(prompts="prompts.txt")
    check(*before, ({"prompts": str(path)}, data_of(prompts=str(path))))
    path.write_text("a red star\na green star\n")
    with pytest.raises(ConfigError, match=r"prompts = prompts.txt: other prompts"):
        check(*before, ({"prompts": "prompts.txt"}, data_of(prompts="prompts.txt")))
    with pytest.raises(ConfigError, match="was written with another images: '', now 'set'"):
        check(*before, ({"images": "set"}, data_of("set")))


def test_a_checkpoint_without_fingerprints_resumes_with_a_warning_from_the_same_path(data, caplog):
    before = config(images="set", model="set")
    for path in ("set", "set/", str(data)):
        check(before, None, ({"images": path, "model": path}, data_of("set")))
    assert "records no fingerprint of its data" in caplog.text
    shutil.copytree(data, data.parent / "moved")
    with pytest.raises(ConfigError, match="another images: 'set', now 'moved'"):
        check(before, None, ({"images": "moved", "model": "set"}, data_of("set")))


def test_a_reward_spelled_in_another_way_is_known_by_its_weights(data):
    before, state = config(reward="set=1,clip=2"), {**STATE, "weights": {"reward": {"set": "1", "clip": "2"}}}
    for spec, hashes in (("set/=1,clip=2", {"set/": "1", "clip": "2"}), (f"{data},clip=2", {str(data): "1", "clip": "2"})):
        check(before, {}, ({"reward": spec}, {}), state=state, weights={"reward": hashes})
    for spec, hashes in (("set/=2,clip=2", {"set/": "1", "clip": "2"}), ("set/=1,clip=2", {"set/": "3", "clip": "2"})):
        with pytest.raises(ConfigError, match="written with another reward"):
            check(before, {}, ({"reward": spec}, {}), state=state, weights={"reward": hashes})
    one = config(reward="set=2"), {}
    with pytest.raises(ConfigError, match="written with another reward"):
        check(*one, ({"reward": "set/=1"}, {}), state={**STATE, "weights": {"reward": {"set": "1"}}}, weights={"reward": {"set/": "1"}})
