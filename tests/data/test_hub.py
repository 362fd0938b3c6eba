"""Data sets of the `datasets` library hold what folders hold."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from helpers.images import SQUARE, Encoder

from trainer.data.cache import TensorCache
from trainer.data.captions import read_captions
from trainer.data.preferences import read_labels, read_pairs
from trainer.data.report import Report
from trainer.data.samples import load_samples


@pytest.fixture
def hf(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    library.disable_progress_bars()
    return library


def encoded(rows):
    return [{"bytes": (row.read_bytes() if hasattr(row, "read_bytes") else row), "path": None} for row in rows]


def table(hf, folder, **columns):
    features = {"image": hf.Image()} | {name: hf.Value("string") for name in columns}
    paths = sorted(folder.glob("*.png"))
    return hf.Dataset.from_dict({"image": encoded(paths), **columns}, features=hf.Features(features))


def test_data_sets_hold_what_folders_hold(hf, folder, tmp_path):
    """Saved, as parquet and as a folder of images with a list: captions and latents are those of the plain folder."""
    plain, captions = load_samples(Encoder(), "", str(folder), SQUARE), [f"caption {i}" for i in range(5)]
    data = table(hf, folder, text=captions)
    data.save_to_disk(tmp_path / "saved")
    hf.DatasetDict({"some": data}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "text": c}) + "\n" for i, c in enumerate(captions)))
    cache, encoder = TensorCache(tmp_path / "cache"), Encoder()
    for source in ("saved", "dict:some", "parquet", "images"):
        found = load_samples(encoder, "", f"hf:{tmp_path / source}", SQUARE, cache)
        for i, prompt in enumerate(found.prompts):
            j = plain.prompts.index(prompt)
            assert torch.equal(found.latents[int(found.image[i])][0], plain.latents[int(plain.image[j])][0])
        assert sorted(found.prompts) == captions
    assert encoder.seen == 5  # the images' bytes are the same wherever they lie


def test_of_several_captions_the_first_is_taken(hf, folder, tmp_path):
    data = table(hf, folder, text=["a"] * 5).remove_columns("text").add_column("captions", [[f"caption {i}", "another"] for i in range(5)])
    data.save_to_disk(tmp_path / "several")
    report = Report()
    assert [caption for _, caption in read_captions(f"hf:{tmp_path / 'several'}", report)] == [f"caption {i}" for i in range(5)]
    assert str(report).endswith("left out: nothing; 5 with several captions, the first taken (row 0, row 1, …)")


def test_data_sets_that_do_not_fit_are_one_line(hf, folder, tmp_path, monkeypatch):
    captions = [f"caption {i}" for i in range(5)]

    def refusal(data, where=""):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        data.save_to_disk(tmp_path / "bad")
        with pytest.raises(ValueError) as error:
            load_samples(Encoder(), "", f"hf:{tmp_path / 'bad'}{where}", SQUARE)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(tmp_path), "")

    data = table(hf, folder, text=captions)
    assert refusal(data.remove_columns("image")).startswith("hf:/bad:train has no image column (path, image, file, file_name, filename, ")
    assert re.search(
        r"has no caption column \(prompt, caption, text, .*\); there are image, title", refusal(data.rename_column("text", "title"))
    )
    assert "row 3 has an empty caption" in refusal(table(hf, folder, text=[*captions[:3], " ", "e"]))
    assert "row 2 has an empty caption" in refusal(table(hf, folder, text=[*captions[:2], None, "d", "e"]))
    numbers = data.remove_columns("text").add_column("text", list(range(1, 6)))
    assert "row 0: expected a text or a list of texts, got 1" in refusal(numbers)
    broken = encoded([b"no image", *sorted(folder.glob("*.png"))[1:]])
    features = hf.Features({"image": hf.Image(), "text": hf.Value("string")})
    assert "row 0 is not a readable image" in refusal(hf.Dataset.from_dict({"image": broken, "text": captions}, features=features))
    gone = [None, *encoded(sorted(folder.glob("*.png"))[1:])]
    assert "row 0 is not a readable image: it is empty" in refusal(
        hf.Dataset.from_dict({"image": gone, "text": captions}, features=features)
    )
    assert "no split 'test'; there are train" in refusal(hf.DatasetDict({"train": data}), ":test")
    with pytest.raises(ValueError, match="hf:nobody/nothing:train cannot be read: "):
        read_captions("hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:nobody/nothing:train needs the datasets library: pip install datasets"):
        read_captions("hf:nobody/nothing")


def preferences(hf, folder, **columns):
    """Two images in each row: 0 and 1, 2 and 3, 4 and 0; those of Pick-a-Pic are bytes."""
    data = [(folder / f"{i}.png").read_bytes() for i in range(5)]
    first, second = [data[0], data[2], data[4]], [data[1], data[3], data[0]]
    return hf.Dataset.from_dict({"jpg_0": first, "jpg_1": second, "caption": ["p", "q", "r"], **columns})


def test_pairs_of_pick_a_pic_are_those_of_a_table(hf, folder, tmp_path):
    """Parquet with JPEG or PNG as bytes, label_0 and has_label: pairs, latents and ties are those of a table of files."""
    data = preferences(hf, folder, label_0=[1.0, 0.0, 0.5], label_1=[0.0, 1.0, 0.5], has_label=[True, True, True])
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    (folder / "pairs.csv").write_text("image_0,image_1,label_0,caption\n0.png,1.png,1,p\n2.png,3.png,0,q\n4.png,0.png,0.5,r\n")
    report = Report()
    found = read_pairs(f"hf:{tmp_path / 'parquet'}", report)
    table = read_pairs(str(folder / "pairs.csv"))
    assert [(a.read_bytes(), b.read_bytes(), p) for a, b, p in found] == [(a.read_bytes(), b.read_bytes(), p) for a, b, p in table]
    assert "2 pairs" in str(report) and "1 ties (row 2)" in str(report)
    one, other = (load_samples(Encoder(), "", "", SQUARE, pairs=s) for s in (f"hf:{tmp_path / 'parquet'}", str(folder / "pairs.csv")))
    assert one.fingerprint == other.fingerprint and torch.equal(
        one.latents[int(one.rejected[1])][0], other.latents[int(other.rejected[1])][0]
    )

    preferences(hf, folder, label_0=[1.0, 0.0, 0.0], has_label=[True, False, True]).save_to_disk(tmp_path / "saved")
    assert [p for _, _, p in read_pairs(f"hf:{tmp_path / 'saved'}")] == ["p", "r"]
    preferences(hf, folder, label_0=[1.0, 2.0, 0.0]).save_to_disk(tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"wrong:train, row 1: label_0 is 2.0: give 1 where image_0 is better"):
        read_pairs(f"hf:{tmp_path / 'wrong'}")
    plain = hf.Dataset.from_dict({"chosen": encoded([folder / "0.png"]), "rejected": encoded([folder / "1.png"]), "prompt": ["p"]})
    plain.save_to_disk(tmp_path / "plain")
    assert [(str(a), p) for a, _, p in read_pairs(f"hf:{tmp_path / 'plain'}")] == [(f"hf:{tmp_path / 'plain'}:train, row 0, chosen", "p")]
    with pytest.raises(ValueError, match="has no column chosen, winner"):
        table_of_images(hf, folder).save_to_disk(tmp_path / "none")
        read_pairs(f"hf:{tmp_path / 'none'}")


def table_of_images(hf, folder):
    return table(hf, folder, text=[f"caption {i}" for i in range(5)])


def test_likes_of_a_data_set(hf, folder, tmp_path):
    table(hf, folder, text=list("abcde"), liked=["1", "-1", "like", "Bad", "true"]).save_to_disk(tmp_path / "likes")
    assert [label for _, _, label in read_labels(f"hf:{tmp_path / 'likes'}")] == [1, -1, 1, -1, 1]
    table(hf, folder, text=list("abcde"), liked=["1", "maybe", "1", "1", "1"]).save_to_disk(tmp_path / "wrong")
    with pytest.raises(ValueError, match="row 1: label 'maybe' is neither liked nor disliked"):
        read_labels(f"hf:{tmp_path / 'wrong'}")


def test_what_a_data_set_is_not_is_one_line(hf, folder, tmp_path):
    """A split that a folder saved without splits has not, no name, ties alone, and the other key's columns."""
    images = [path.read_bytes() for path in sorted(folder.glob("*.png"))[:2]]
    hf.Dataset.from_dict({"jpg_0": images, "jpg_1": images[::-1], "label_0": [0.5, 0.5], "caption": ["a", "b"]}).save_to_disk(
        tmp_path / "pick"
    )
    hf.Dataset.from_dict({"image": images, "label": [1, 0], "prompt": ["a", "b"]}).save_to_disk(tmp_path / "rated")
    for read, name, said in (
        (read_labels, f"{tmp_path}/rated:test", "no split 'test': the folder was saved without splits, leave :test out"),
        (read_labels, "", "hf: names no data set: write hf:NAME or hf:FOLDER"),
        (read_pairs, f"{tmp_path}/pick", "pick:train holds no pair: all of its 2 rows are ties, or unlabelled"),
        (read_pairs, f"{tmp_path}/rated", "there are image, label, prompt: images with labels are `labels`"),
        (read_labels, f"{tmp_path}/pick", "there are jpg_0, jpg_1, label_0, caption: pairs of images are `pairs`"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            read(f"hf:{name}")
    assert len(read_labels(f"hf:{tmp_path}/rated:train")) == len(read_labels(f"hf:{tmp_path}/rated")) == 2
