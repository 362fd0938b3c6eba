"""Which files of a folder are images, and images that a strict reader would refuse."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from helpers.images import write_image
from PIL import Image, ImageCms, PngImagePlugin, features

from trainer.data import images
from trainer.data.captions import read_captions
from trainer.data.report import Report

KINDS = {"a.png": "PNG", "b.jpeg": "JPEG", "c.jfif": "JPEG", "d.tif": "TIFF", "e.gif": "GIF", "f.bmp": "BMP", "g.PNG": "PNG"}
KINDS |= {name: kind for name, kind in (("h.avif", "AVIF"), ("i.webp", "WEBP")) if features.check(kind.lower())}


def save(path, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, format=kind, **options)
    return path


def found(folder):
    report = Report()
    return [str(path.relative_to(folder)) for path in images.find(folder, report)], report


def test_every_format_that_pillow_opens_is_an_image(tmp_path):
    for name, kind in KINDS.items():
        save(tmp_path / name, kind)
        (tmp_path / name).with_suffix(".txt").write_text(f"the file {name}")
    pairs = read_captions(str(tmp_path))
    assert [(path.name, caption) for path, caption in pairs] == [(name, f"the file {name}") for name in sorted(KINDS)]
    for path, _ in pairs:
        assert (images.load(path, 8) - torch.tensor([1.0, 0, 0]).view(3, 1, 1)).abs().max() < 0.05
    (tmp_path / "j.heic").write_bytes(b"\0\0\0\x18ftypheic")
    if ".heic" not in images.SUFFIXES:
        assert "left out: 1 .heic (this Pillow cannot open them, save as PNG) (j.heic)" in str(found(tmp_path)[1])
        with pytest.raises(ValueError, match=r"j.heic is not a readable image: this Pillow cannot open .heic, save it as PNG"):
            images.open_image(tmp_path / "j.heic")


def test_what_systems_and_editors_leave_in_folders_is_left_out(tmp_path):
    for name in ("a.png", "._a.png", ".hidden/b.png", "x/.ipynb_checkpoints/c.png", "@eaDir/a.png/thumb.jpg", "__MACOSX/a.png", "x/d.png"):
        save(tmp_path / name, "JPEG" if name.endswith("jpg") else "PNG")
    for name in ("Thumbs.db", "notes.md", "a.npz", "a.txt", "gone.txt"):
        (tmp_path / name).write_text("x")
    names, report = found(tmp_path)
    assert names == ["a.png", "x/d.png"]
    assert {why: sorted(names) for why, names in report.left_out.items()} == {
        "hidden": ["._a.png", ".hidden", ".ipynb_checkpoints", "@eaDir", "Thumbs.db", "__MACOSX"],
        "not an image": ["a.npz", "notes.md"],
        "text without an image": ["gone.txt"],
    }
    assert str(report).startswith(f"read 2 images from {tmp_path}; left out: 6 hidden (") and "2 not an image (" in str(report)
    assert found(tmp_path / ".hidden")[0] == ["b.png"]  # a folder that is named is read


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    save(folder / "5_cat" / "a.png"), save(elsewhere / "b.png"), save(elsewhere / "deep" / "c.png"), save(tmp_path / "outside.png")
    for name, target in (
        ("10_dog", elsewhere),
        ("1_first", folder / "5_cat"),
        ("round", folder),
        ("up", tmp_path),
        ("none", tmp_path / "x"),
    ):
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    names, report = found(folder)
    assert names == ["10_dog/b.png", "10_dog/deep/c.png", "5_cat/a.png"]
    assert sorted(report.left_out["linked folder that is read already"]) == ["1_first", "back", "round", "up"]
    assert [path.name for path in images.find(folder / "10_dog")] == ["b.png", "a.png", "c.png"]  # 10_dog/back/5_cat/a.png
    (tmp_path / "link").symlink_to(folder)
    assert len(images.find(tmp_path / "link")) == 3


def test_of_an_animation_the_first_frame_is_taken_and_the_report_says_so(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    save(tmp_path / "still.gif", "GIF")
    assert str(found(tmp_path)[1]).endswith("; left out: nothing; 1 animated, the first frame taken (a.gif)")
    assert images.load(tmp_path / "a.gif", 8)[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("megabytes", [2, 20])
def test_large_texts_and_colour_profiles_do_not_hide_a_png(megabytes, tmp_path):
    """Workflows and profiles of megabytes, compressed: Pillow's own limit is 1 MB."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "w" * (megabytes << 20), zip=True)
    save(tmp_path / "text.png", pnginfo=text)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"\0" * (megabytes << 20)
    save(tmp_path / "profile.png", icc_profile=profile)
    for name in ("text.png", "profile.png"):
        assert images.load(tmp_path / name, 8)[:, 0, 0].tolist() == [1, 0, 0] and images.size_of(tmp_path / name) == (8, 8)


def test_damaged_exif_costs_no_image(tmp_path):
    save(tmp_path / "a.png", exif=b"Exif\0\0no tags at all")
    save(tmp_path / "b.jpg", "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for name in ("a.png", "b.jpg"):
        assert images.open_image(tmp_path / name).size == (8, 8) and images.size_of(tmp_path / name) == (8, 8)


def test_names_that_are_not_utf_8_are_read(tmp_path):
    write_image(tmp_path / "x.png", 0)
    name = os.fsdecode(b"caf\xe9")
    os.rename(tmp_path / "x.png", tmp_path / f"{name}.png")
    (tmp_path / f"{name}.txt").write_text("a red star")
    (tmp_path / f"{name}.csv").write_text("")
    report = Report()
    assert read_captions(str(tmp_path), report) == [(tmp_path / f"{name}.png", "a red star")]
    assert "(caf\\udce9.csv)" in str(report)  # can be printed anywhere
    assert zlib.crc32(images.open_image(tmp_path / f"{name}.png").tobytes())
