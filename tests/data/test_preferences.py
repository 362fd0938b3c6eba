"""Pairs and labels from tables and folders."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.images import SQUARE, Encoder, write_image

from trainer.data import images
from trainer.data.batches import Labels, Pairs
from trainer.data.cache import TensorCache
from trainer.data.preferences import read_labels, read_pairs
from trainer.data.report import Report
from trainer.data.samples import check_sources, load_samples


@pytest.fixture
def table(folder):
    """A function that writes a table beside five captioned images."""

    def write(content, name="table.csv"):
        (folder / name).write_text(content, "utf-8")
        return folder / name

    return write


@pytest.fixture
def halves(tmp_path):
    """liked/ and disliked/ with images a, b and c each, of which the liked ones have captions."""
    for i, name in enumerate("abc"):
        write_image(tmp_path / "set" / "liked" / f"{name}.png", i, f"caption {name}")
        write_image(tmp_path / "set" / "disliked" / f"{name}.png", 10 + i)
    return tmp_path / "set"


def test_tables_of_pairs(table, folder):
    expected = [(folder / "0.png", folder / "1.png", "a star, red"), (folder / "2.png", folder / "1.png", "caption 2")]
    assert read_pairs(str(table("chosen,rejected,prompt\n0.png,1.png,a star, red\n2.png,1.png,\n"))) == expected
    lines = [{"winner": "0.png", "loser": "1.png", "caption": "a star, red"}, {"Image Chosen": "2.png", "image-rejected": "1.png"}]
    assert read_pairs(str(table("\n".join(map(json.dumps, lines)), "table.jsonl"))) == expected


def test_tables_of_pick_a_pic_leave_ties_out(table, folder):
    report = Report()
    rows = "image_0,image_1,label_0,caption\n0.png,1.png,1,p\n0.png,1.png,0,q\n0.png,1.png,0.5,r\n"
    assert read_pairs(str(table(rows)), report) == [(folder / "0.png", folder / "1.png", "p"), (folder / "1.png", folder / "0.png", "q")]
    assert "2 pairs" in str(report) and "1 ties (line 4)" in str(report)
    with pytest.raises(ValueError, match="table.csv names no pair: all of its 2 rows are ties, or unlabelled"):
        read_pairs(str(table("image_0,image_1,label_0,caption\n0.png,1.png,0.5,p\n0.png,1.png,0.5,q\n")))


def test_a_row_of_pick_a_pic_without_a_verdict_is_no_pair(table, folder):
    """Where nobody chose, its label_0 is 0: image_1 is not better there."""
    report = Report()
    labels = ("1,0,True", "0,0,True", "0,1,False", "0,1,1", "0,,")
    content = "image_0,image_1,label_0,label_1,has_label,caption\n" + "".join(f"0.png,1.png,{one},p{i}\n" for i, one in enumerate(labels))
    first, second = folder / "0.png", folder / "1.png"
    assert read_pairs(str(table(content)), report) == [(first, second, "p0"), (second, first, "p3"), (second, first, "p4")]
    assert "2 ties (line 3, line 4)" in str(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_0,image_1,label_0,label_1,prompt\n0.png,1.png,1,1,p\n", r"line 2: label_0 is 1 and label_1 1: they must sum to 1"),
        ("winner,chosen,rejected,prompt\n0.png,1.png,2.png,p\n", r"line 2: chosen and winner name different images: leave one"),
        ("chosen,rejected,prompt\n0.png,,p\n", r"table.csv, line 2: no worse image; name it in a column rejected, loser, dispreferred"),
        ("chosen,prompt\n0.png,p\n", r"table.csv, line 2: no worse image; name it in a column rejected"),
        ("rejected,prompt\n0.png,p\n", r"table.csv, line 2: no better image; name it in a column chosen"),
        ("chosen,rejected,prompt\n0.png,1.png,p\n0.png,0.png,p\n", r"table.csv, line 3: both images of the pair are 0.png: name two"),
        ("chosen,rejected,prompt\n0.png,gone.png,p\n", r"table.csv, line 2 names .*gone.png, which does not exist"),
        ("image_0,image_1,label_0,prompt\n0.png,1.png,maybe,p\n", r"line 2: label_0 is 'maybe': give 1 where image_0 is better"),
        ("image_0,image_1,prompt\n0.png,1.png,p\n", r"line 2: label_0 is missing: give 1"),
        ("chosen,rejected,prompt\n", r"table.csv names no pair"),
        ("image,prompt\n0.png,p\n", r"table.csv, line 1: no column chosen, winner"),
    ],
)
def test_pairs_that_are_not_complete_are_one_line(content, message, table):
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(str(table(content)))
    assert "\n" not in str(caught.value)


def test_a_pair_of_equal_files_is_refused(table, folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    source = table("chosen,rejected,prompt\n1.png,2.png,p\n0.png,copy.png,p\n")
    with pytest.raises(ValueError, match=r"0.png and .*copy.png are a pair of equal images: a pair needs a better and a worse one"):
        load_samples(Encoder(), "", "", SQUARE, pairs=str(source))


def test_folders_of_pairs(halves):
    found = read_pairs(str(halves))
    assert found == [(halves / "liked" / f"{n}.png", halves / "disliked" / f"{n}.png", f"caption {n}") for n in "abc"]
    (halves / "disliked" / "a.txt").write_text("another")
    with pytest.raises(ValueError, match=r"liked/a.png and .*disliked/a.png have different captions: a pair has one prompt"):
        read_pairs(str(halves))
    (halves / "disliked" / "a.txt").unlink()
    (halves / "disliked" / "b.png").unlink()
    with pytest.raises(
        ValueError, match=r"liked/b.png has no image of its name in .*disliked: a pair needs both, or give the folder as labels"
    ):
        read_pairs(str(halves))
    (halves / "liked" / "b.png").unlink()
    (halves / "liked" / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"liked/c.png has no caption: write one into c.txt beside it"):
        read_pairs(str(halves))
    with pytest.raises(ValueError, match=r"has no folder liked: put the better images in liked, the worse in disliked"):
        read_pairs(str(halves / "liked"))
    with pytest.raises(ValueError, match=r"pairs = nowhere: no such file or folder"):
        read_pairs("nowhere")
    with pytest.raises(ValueError, match=r"pairs = ~/pairs.csv: no such file or folder; write the folder instead of ~"):
        read_pairs("~/pairs.csv")


@pytest.mark.parametrize("words", [("liked", "disliked"), ("1", "0"), ("1", "-1"), ("True", "False"), ("1.0", "0.0"), ("up", "down")])
def test_tables_of_labels(words, table, folder):
    content = f"image,prompt,label\n0.png,p,{words[0]}\n1.png,,{words[1]}\n"
    assert read_labels(str(table(content))) == [(folder / "0.png", "p", 1.0), (folder / "1.png", "caption 1", -1.0)]


def test_labels_in_json_may_be_numbers_and_truth_values(table, folder):
    lines = [{"image": "0.png", "prompt": "p", "liked": True}, {"image": "1.png", "prompt": "q", "vote": -1}]
    found = read_labels(str(table("\n".join(map(json.dumps, lines)), "table.jsonl")))
    assert found == [(folder / "0.png", "p", 1.0), (folder / "1.png", "q", -1.0)]


def test_an_image_with_both_labels_is_liked(table, folder):
    report = Report()
    found = read_labels(str(table("image,prompt,label\n0.png,p,0\n0.png,p,1\n1.png,p,0\n0.png,q,0\n")), report)
    assert found == [(folder / "0.png", "p", 1.0), (folder / "1.png", "p", -1.0), (folder / "0.png", "q", -1.0)]
    assert "labelled both ways, taken as liked (0.png)" in str(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,prompt,label\n0.png,p,1\n1.png,p,maybe\n",
            r"table.csv, line 3: label 'maybe' is neither liked nor disliked: give these words",
        ),
        ("image,prompt,label\n0.png,p,1\n1.png,p,\n", r"table.csv, line 3: label missing is neither liked nor disliked"),
        ("image,prompt,vote,liked\n0.png,p,1,no\n", "line 2: liked is 'no' and vote '1': leave one of these columns out"),
        ("image,prompt,label\n0.png,p,1\n1.png,p,0\n2.png,p,-1\n", r"labels are 0 and -1 as well: leave out what is neither"),
        ("image,prompt,label\n0.png,p,1\n1.png,p,yes\n", r"table.csv: 2 images are liked and 0 disliked: give some of both"),
        ("image,prompt,label\ngone.png,p,1\n1.png,p,0\n", r"table.csv, line 2 names .*gone.png, which does not exist"),
    ],
)
def test_labels_that_are_neither_are_one_line(content, message, table):
    with pytest.raises(ValueError, match=message):
        read_labels(str(table(content)))


def test_folders_of_labels(halves):
    with pytest.raises(ValueError, match=r"disliked/a.png has no caption"):
        read_labels(str(halves))
    for name in "abc":
        (halves / "disliked" / f"{name}.txt").write_text(f"other {name}")
    (halves / "disliked" / "b.png").unlink()
    report = Report()
    labels = {(path.parent.name, path.stem): (caption, label) for path, caption, label in read_labels(str(halves), report)}
    assert len(labels) == 5 and labels["liked", "a"] == ("caption a", 1.0) and labels["disliked", "c"] == ("other c", -1.0)
    assert "3 liked, 2 disliked" in str(report) and "1 text without an image (b.txt)" in str(report)


# -- samples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_batches_of_pairs(cached, table, folder, tmp_path):
    """Each image is encoded once, both of a pair get one posterior draw, and shares of processes never divide a pair."""
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache") if cached else None
    source = table("chosen,rejected,prompt\n0.png,1.png,p\n2.png,1.png,q\n3.png,0.png,r\n")
    samples = load_samples(encoder, "", "", SQUARE, cache, pairs=str(source))
    assert samples.data is Pairs and encoder.seen == 4 and samples.prompts == ("p", "q", "r")
    names = {"p": (0, 1), "q": (2, 1), "r": (3, 0)}
    for number in range(4):
        whole = samples.batch(5, number, number, 2)
        for prompt, chosen, rejected in zip(whole.prompts, whole.chosen, whole.rejected):
            means = [Encoder().encode(images.load(folder / f"{i}.png", 8)[None])[0][0] for i in names[prompt]]
            noise = chosen - means[0]
            assert 0 < float(noise.abs().max()) < 0.01
            torch.testing.assert_close(rejected - means[1], noise, atol=1e-6, rtol=0)
        parts = [samples.batch(5, number, number, 2, range(i, i + 1)) for i in range(2)]
        for name in ("chosen", "rejected"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_both_images_of_a_pair_have_the_size_of_the_better_one(tmp_path):
    from PIL import Image

    for name, size in (("wide", (16, 4)), ("square", (8, 8)), ("tall", (4, 16))):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("chosen,rejected,prompt\nwide.png,tall.png,p\nsquare.png,wide.png,q\n", "utf-8")
    samples = load_samples(Encoder(), "", "", ((8, 8), (4, 16), (16, 4)), pairs=str(tmp_path / "t.csv"))
    for number in range(4):
        batch = samples.batch(0, number, number, 1)
        assert batch.chosen.shape == batch.rejected.shape == ((1, 3, 2, 8) if batch.prompts == ("p",) else (1, 3, 4, 4))


def test_batches_of_labels(table):
    source = table("image,prompt,label\n0.png,p,1\n1.png,q,0\n2.png,r,0\n")
    samples = load_samples(Encoder(), "", "", SQUARE, labels=str(source))
    batch = samples.batch(0, 0, 0, 3)
    assert samples.data is Labels and dict(zip(batch.prompts, batch.labels.tolist())) == {"p": 1.0, "q": -1.0, "r": -1.0}


def test_what_tells_one_set_of_preferences_from_another(table):
    def fingerprint(content, **key):
        name = next(iter(key))
        return load_samples(Encoder(), "", "", SQUARE, **{name: str(table(content))}).fingerprint

    rows = "chosen,rejected,prompt\n0.png,1.png,p\n2.png,1.png,q\n"
    one = fingerprint(rows, pairs=1)
    assert one == fingerprint(rows, pairs=1) and one["number"] == 2
    assert one["pairs"] != fingerprint(rows.replace("2.png,1.png", "1.png,2.png"), pairs=1)["pairs"]
    rows = "image,prompt,label\n0.png,p,1\n1.png,p,0\n"
    assert (
        fingerprint(rows, labels=1)["labels"]
        != fingerprint(rows.replace("p,1", "p,x").replace("p,0", "p,1").replace("p,x", "p,0"), labels=1)["labels"]
    )


def test_one_source_at_a_time():
    with pytest.raises(ValueError, match="images and pairs are both given: a run trains on one of them"):
        check_sources("", "photos", "pairs.csv")


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_pairs, "image,prompt,label\n0.png,p,1\n", "pairs = {}: its rows name one image each; images with labels are `labels`"),
        (read_labels, "chosen,rejected,prompt\n0.png,1.png,p\n", "labels = {}: its rows name two images each; pairs are `pairs`"),
        (read_labels, "image_0,image_1,label_0,prompt\n0.png,1.png,1,p\n", "labels = {}: its rows name two images each"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_other_kind_of_table_is_told_its_key(read, content, said, suffix, table):
    path = table(content)
    if suffix == "jsonl":
        names, values = (line.split(",") for line in content.splitlines())
        path = path.with_suffix(".jsonl")
        path.write_text(json.dumps(dict(zip(names, values))) + "\n")
    with pytest.raises(ValueError, match=re.escape(said.format(path))):
        read(str(path))
