"""Scores written into a PNG leave every other byte alone; tables are read from any folder."""

from __future__ import annotations

import json
import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from trainer.data.captions import read_captions
from trainer.rewards.weighted import RewardSpec
from trainer.scoring.items import find_items
from trainer.scoring.png import update_text
from trainer.scoring.scorer import ScoredImage
from trainer.scoring.table import KEY, Table


def chunks(data):
    """(type, all bytes) of each chunk, read by hand."""
    at, found = 8, []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind, data[at : at + 12 + length]))
        at += 12 + length
    return found


def rich(path, frames=0):
    """A PNG with a profile, EXIF, texts of all three types and a chunk that no reader knows."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "ä star")
    info.add_text("packed", "x" * 500, zip=True)
    info.add_itxt("long", "ю" * 500, zip=True)
    info.add(b"prVt", b"of a camera", after_idat=True)
    exif = Image.Exif()
    exif[0x010E] = "described"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    more = {"save_all": True, "append_images": [Image.fromarray(255 - pixels)] * frames, "duration": 100} if frames else {}
    image.save(path, pnginfo=info, exif=exif, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), **more)
    return path


def table(**raw):
    rewards = [RewardSpec(name, None) for name in raw]  # type: ignore[arg-type]
    return Table(rewards, raw=True)


def write(path, prompt, **raw):
    return table(**raw).write_back([ScoredImage(str(path), prompt, raw)])


@pytest.mark.parametrize("frames", [0, 2])
def test_every_other_chunk_stays_byte_for_byte_and_in_order(frames, tmp_path):
    path = rich(tmp_path / "a.png", frames)
    path.write_bytes(path.read_bytes() + b"behind the image")
    before = path.read_bytes().removesuffix(b"behind the image")
    for value in (1.0, 2.0):
        assert write(path, "a", bright=value) == []
    assert path.read_bytes().endswith(b"behind the image")
    after = chunks(path.read_bytes().removesuffix(b"behind the image"))
    (own,) = [i for i, (_, whole) in enumerate(after) if KEY.encode() in whole]
    assert [c for i, c in enumerate(after) if i != own] == chunks(before) and after[own + 1][0] in (b"IDAT", b"fcTL")
    assert {b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"prVt", b"IDAT"} <= {kind for kind, _ in after}
    old, new = Image.open(BytesIO(before)), Image.open(path)
    for frame in range(frames):
        old.seek(frame)
        new.seek(frame)
        assert np.array_equal(np.asarray(old), np.asarray(new))


def scores(path):
    return json.loads(Image.open(path).info[KEY])


def test_scores_of_other_prompts_and_other_rewards_stay(tmp_path):
    path = rich(tmp_path / "a.png")
    write(path, "ä star", bright=1.0)
    assert scores(path) == {"prompt": "ä star", "bright": 1.0, "score": 1.0}
    write(path, "a ring", bright=2.0)
    write(path, "ä star", sharp=3.0)
    write(path, "a ring", bright=4.0)
    assert scores(path) == [
        {"prompt": "ä star", "bright": 1.0, "sharp": 3.0, "score": 3.0},
        {"prompt": "a ring", "bright": 4.0, "score": 4.0},
    ]
    both = [ScoredImage(str(path), "x", {"bright": 5.0}), ScoredImage(str(path), "y", {"bright": 6.0})]
    assert table(bright=0).write_back(both) == [] and [s["prompt"] for s in scores(path)] == ["ä star", "a ring", "x", "y"]


@pytest.mark.parametrize("kind", ["itxt", "ztxt"])
def test_scores_that_another_program_stored_anew_are_found(kind, tmp_path):
    info = PngImagePlugin.PngInfo()
    text = json.dumps({"prompt": "a", "bright": 1.0})
    if kind == "itxt":
        info.add_itxt(KEY, text, zip=True)
    else:
        info.add_text(KEY, text, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    write(tmp_path / "a.png", "b", bright=2.0)
    assert [s["prompt"] for s in scores(tmp_path / "a.png")] == ["a", "b"] and (tmp_path / "a.png").read_bytes().count(KEY.encode()) == 1


def test_what_cannot_be_written_is_said_per_image_and_stays(tmp_path):
    odd = PngImagePlugin.PngInfo()
    odd.add_text(KEY, "not json")
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png", pnginfo=odd)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    cut = rich(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-6])
    names = {
        "odd.png": "not a table of scores",
        "a.jpg": "not a PNG",
        "a.webp": "not a PNG",
        "cut.png": "cut short: it was not changed",
        "good.png": "",
    }
    before = {name: (tmp_path / name).read_bytes() for name in names}
    failed = table(bright=0).write_back([ScoredImage(str(tmp_path / name), "p", {"bright": 1.0}) for name in names])
    assert [row.path for row in failed] == [str(tmp_path / name) for name in list(names)[:4]]
    for row, message in zip(failed, names.values()):
        assert message in row.error and row.path in row.error
    assert [name for name in names if (tmp_path / name).read_bytes() != before[name]] == ["good.png"]


def test_mode_times_and_links_stay_and_neighbours_too(tmp_path):
    path, link = rich(tmp_path / "a.png"), tmp_path / "b.png"
    path.chmod(0o640)
    os.utime(path, ns=(10**18, 10**18 + 5))
    link.symlink_to(path)
    (tmp_path / "a.png.partial").write_text("somebody's")
    update_text(link, "k", lambda old: f"{old}!")
    update_text(link, "k", lambda old: f"{old}!")
    assert link.is_symlink() and Image.open(path).info["k"] == "None!!"
    assert path.stat().st_mode & 0o777 == 0o640 and path.stat().st_mtime_ns == 10**18 + 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.png.partial", "b.png"]
    assert (tmp_path / "a.png.partial").read_text() == "somebody's"


def test_a_full_disk_leaves_the_image(tmp_path, monkeypatch):
    path = rich(tmp_path / "a.png")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write into .*a.png: .*No space left"):
        update_text(path, "k", lambda old: "v")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_unpacked_text_is_bounded(tmp_path):
    body = KEY.encode() + b"\0\0" + zlib.compress(b"1" * (1 << 26))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    assert "not a table of scores" in write(tmp_path / "a.png", "p", bright=1.0)[0].error


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_table_is_read_from_any_folder_by_score_and_train(suffix, linked, tmp_path, monkeypatch):
    place = tmp_path / "in"
    place.mkdir()
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "else" / "where") if linked else (tmp_path / "out").mkdir()
    names = ("0.png", " a,b;c.png", 'q"uote.png', "ю.png")
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (i, i, i)).save(place / name)
    prompts = ('a "star", crisp', " with\rodd\nends ", "; | \t", "a ring")
    monkeypatch.chdir(tmp_path)
    paths = [*(f"in/{name}" for name in names[:3]), str(place / names[3])]
    file = tmp_path / "out" / f"scores.{suffix}"
    table(bright=0).write([ScoredImage(path, prompt, {"bright": 0.5}) for path, prompt in zip(paths, prompts)], file)
    monkeypatch.chdir(tmp_path / "else")
    for found in ([(i.path, i.prompt) for i in find_items([str(file)])], read_captions(str(file))):
        assert [os.path.realpath(str(path)) for path, _ in found] == [str(place / name) for name in names]
        assert [prompt for _, prompt in found] == [prompt.strip() for prompt in prompts]
    assert str(place / names[3]) in file.read_text("utf-8")  # absolute ones stay so
    if not linked:
        assert "../in/0.png" in file.read_text("utf-8")
