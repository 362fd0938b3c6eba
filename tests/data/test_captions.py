"""Captions of folders in kohya's layout and of manifests."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.images import SQUARE, Encoder, write_image

from trainer.data import images
from trainer.data.captions import read_captions
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples, load_samples


def test_subfolders_named_with_a_number_count_so_often(tmp_path):
    write_image(tmp_path / "3_sks dog" / "a.png", 0, "a dog")
    write_image(tmp_path / "3_sks dog" / "10_deeper" / "b.png", 1, "a deep dog")
    write_image(tmp_path / "1_reg" / "c.png", 2, "any dog")
    write_image(tmp_path / "2024" / "d.png", 3, "no number and name")
    write_image(tmp_path / "0_none" / "e.png", 4, "nought does not count")
    write_image(tmp_path / "7_.png", 5, "a file")
    pairs = read_captions(str(tmp_path))
    times = {caption: sum(c == caption for _, c in pairs) for _, caption in pairs}
    assert times == {"a dog": 3, "a deep dog": 3, "any dog": 1, "no number and name": 1, "nought does not count": 1, "a file": 1}
    encoder = Encoder()
    samples = load_samples(encoder, "", str(tmp_path), SQUARE)
    assert encoder.seen == 6 and len(samples.prompts) == 10 and torch.stack(samples.latents.mean).shape == (6, 3, 4, 4)
    whole = samples.batch(0, 0, 0, 10)
    plain = LatentsInMemory(*(torch.stack(v)[samples.image] for v in (samples.latents.mean, samples.latents.std)))
    plain = Samples(samples.prompts, plain).batch(0, 0, 0, 10)
    assert whole.prompts == plain.prompts and torch.equal(whole.latents, plain.latents)
    dogs = [latent for latent, prompt in zip(whole.latents, whole.prompts) if prompt == "a dog"]
    expected = Encoder().encode(images.load(tmp_path / "3_sks dog" / "a.png", 8)[None])[0][0]
    assert len(dogs) == 3 and all((dog - expected).abs().max() < 0.01 for dog in dogs)


def test_captions_may_be_in_kohyas_other_files(tmp_path):
    """Where both are there, `.txt` is read."""
    for name, text in (("a", "from .txt"), ("b", "from .caption")):
        write_image(tmp_path / f"{name}.png", 0, text)
        (tmp_path / f"{name}.caption").write_text("from .caption")
    (tmp_path / "b.txt").unlink()
    assert [caption for _, caption in read_captions(str(tmp_path))] == ["from .txt", "from .caption"]


def test_manifests_name_images_and_captions(folder):
    (folder / "list.csv").write_text('image,text\n0.png,"a, b"\n1.png,\n0.png,again\n', "utf-8")
    expected = [(folder / "0.png", "a, b"), (folder / "1.png", "caption 1"), (folder / "0.png", "again")]
    assert read_captions(str(folder / "list.csv")) == expected
    lines = [{"file_name": "2.png", "caption": "ü"}, {"path": str(folder / "3.png"), "prompt": "p"}]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    assert read_captions(str(folder / "list.jsonl")) == [(folder / "2.png", "ü"), (folder / "3.png", "p")]
    samples = load_samples(Encoder(), "", str(folder / "list.csv"), SQUARE)
    assert samples.prompts == ("a, b", "caption 1", "again") and samples.image.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,text\ncafé.png,x\n".encode("latin-1"), r"a.csv is not UTF-8 \(line 2, byte 0xE9\): save it as UTF-8"),
        ("a.csv", b"image,text\nnot there.png,x\n", "not there.png, which does not exist"),
        ("a.csv", b"image,text\n", "names no image"),
        ("a.csv", b"who,text\nx,y\n", "a.csv, line 1: no column path, image, .*; there are who, text"),
        ("a.jsonl", b'{"image": "0.png"\n', "a.jsonl, line 1 is not JSON"),
        ("0.txt", "café".encode("latin-1"), "0.txt is not UTF-8"),
        ("0.txt", b" \n", r"0.png has no caption: write one into 0.txt beside it"),
    ],
)
def test_bad_lists_and_captions_name_their_file(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(folder / name if name.startswith("a.") else folder))
    with pytest.raises(ValueError, match=r"no image folder .* and no manifest"):
        read_captions(str(folder / "nothing"))


def test_a_folder_named_by_a_date_does_not_repeat_its_images(tmp_path):
    """20240115 times each would take all memory."""
    write_image(tmp_path / "20240115_holiday" / "a.png", 0, "a lake")
    with pytest.raises(ValueError, match="20240115_holiday would repeat its images 20240115 times .1000 at most.: rename it, holiday_2024"):
        read_captions(str(tmp_path))
