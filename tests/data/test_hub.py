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
