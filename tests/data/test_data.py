"""What training reads: folders in kohya's layout, manifests, and latents that are encoded once."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.processes import finish, said, start
from PIL import Image

from trainer.data.cache import TensorCache
from trainer.data.images import load
from trainer.data.samples import Samples, load_samples, read_captions
from trainer.models import diffusers_policy as base
from trainer.models.load import load_policy
from trainer.runtime.processes import joined

SQUARE = ((8, 8),)


class Encoder:
    """An autoencoder that halves pictures, and counts them."""

    def __init__(self, name="vae"):
        self.seen, self.name = 0, name

    def latents_depend_on(self):
        return self.name

    def encode(self, images):
        self.seen += len(images)
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, 0.001 + 0 * mean


def picture(path, seed, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        picture(tmp_path / "pictures" / f"{i}.png", i, f"caption {i}")
    return tmp_path / "pictures"


def test_subfolders_named_with_a_number_count_so_often(tmp_path):
    picture(tmp_path / "3_sks dog" / "a.png", 0, "a dog")
    picture(tmp_path / "3_sks dog" / "10_deeper" / "b.png", 1, "a deep dog")
    picture(tmp_path / "1_reg" / "c.png", 2, "any dog")
    picture(tmp_path / "2024" / "d.png", 3, "no number and name")
    picture(tmp_path / "0_none" / "e.png", 4, "nought is no number of times")
    picture(tmp_path / "7_.png", 5, "a file")
    pairs = read_captions(str(tmp_path))
    times = {caption: sum(c == caption for _, c in pairs) for _, caption in pairs}
    assert times == {"a dog": 3, "a deep dog": 3, "any dog": 1, "no number and name": 1, "nought is no number of times": 1, "a file": 1}
    encoder = Encoder()
    samples = load_samples(encoder, "", str(tmp_path), SQUARE)
    assert encoder.seen == 6 and len(samples.prompts) == 10 and torch.stack(samples.mean).shape == (6, 3, 4, 4)
    whole = samples.batch(0, 0, 0, 10)
    plain = Samples(samples.prompts, *(torch.stack(v)[samples.picture] for v in (samples.mean, samples.std))).batch(0, 0, 0, 10)
    assert whole.prompts == plain.prompts and torch.equal(whole.latents, plain.latents)
    dogs = [latent for latent, prompt in zip(whole.latents, whole.prompts) if prompt == "a dog"]
    expected = Encoder().encode(load(tmp_path / "3_sks dog" / "a.png", 8)[None])[0][0]
    assert len(dogs) == 3 and all((dog - expected).abs().max() < 0.01 for dog in dogs)


def test_manifests_name_pictures_and_captions(folder):
    (folder / "list.csv").write_text('image,text\n0.png,"a, b"\n1.png,\n0.png,again\n', "utf-8")
    expected = [(folder / "0.png", "a, b"), (folder / "1.png", "caption 1"), (folder / "0.png", "again")]
    assert read_captions(str(folder / "list.csv")) == expected
    lines = [{"file_name": "2.png", "caption": "ü"}, {"path": str(folder / "3.png"), "prompt": "p"}]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    assert read_captions(str(folder / "list.jsonl")) == [(folder / "2.png", "ü"), (folder / "3.png", "p")]
    samples = load_samples(Encoder(), "", str(folder / "list.csv"), SQUARE)
    assert samples.prompts == ("a, b", "caption 1", "again") and samples.picture.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,text\ncafé.png,x\n".encode("latin-1"), "a.csv is no readable manifest: 'utf-8' codec"),
        ("a.csv", b"image,text\nnot there.png,x\n", "not there.png, which does not exist"),
        ("a.csv", b"image,text\n", "names no picture"),
        ("a.csv", b"who,text\nx,y\n", "line 2: no picture; name one in a column"),
        ("a.jsonl", b'{"image": "0.png"\n', "a.jsonl is no readable manifest"),
        ("0.txt", "café".encode("latin-1"), "0.txt is not UTF-8"),
        ("0.txt", b" \n", "0.txt is empty"),
    ],
)
def test_bad_lists_and_captions_name_their_file(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(folder / name if name.startswith("a.") else folder))
    with pytest.raises(ValueError, match=r"no image folder .* and no manifest"):
        read_captions(str(folder / "nothing"))


@pytest.mark.parametrize("sizes", [SQUARE, ((8, 8), (4, 16))])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("content", [b"", b"no picture", "half", None])
def test_unreadable_pictures_are_named(content, cached, sizes, folder, tmp_path):
    good = (folder / "3.png").read_bytes()
    (folder / "3.png").unlink()
    if content is None:
        (folder / "3.png").mkdir()
    else:
        (folder / "3.png").write_bytes(good[: len(good) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=r"3\.png is no readable picture: "):
        load_samples(Encoder(), "", str(folder), sizes, TensorCache(tmp_path / "cache") if cached else None)


def test_few_pictures_are_in_memory_at_once(folder, monkeypatch):
    most, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, images: most.append(tuple(images.shape)) or encode(self, images))
    monkeypatch.setattr("trainer.data.samples.PIXELS_AT_ONCE", 2 * 64)
    load_samples(Encoder(), "", str(folder), SQUARE)
    assert [shape[0] for shape in most] == [2, 2, 1]


# -- data sets of the `datasets` library ---------------------------------------------------------------------------------


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
    """Saved, as parquet and as a folder of pictures with a list: captions and latents are those of the plain folder."""
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
    for source in ("saved", "dict:some", "parquet", "pictures"):
        found = load_samples(encoder, "", f"hf:{tmp_path / source}", SQUARE, cache)
        for i, prompt in enumerate(found.prompts):
            j = plain.prompts.index(prompt)
            assert torch.equal(found.mean[found.picture[i]], plain.mean[plain.picture[j]])
        assert sorted(found.prompts) == captions
    assert encoder.seen == 5  # the pictures' bytes are the same wherever they lie


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
    assert refusal(data.remove_columns("image")) == (
        "hf:/bad:train has no picture column (path, image, file, file_name, filename, image_path); there are text"
    )
    assert "has no caption column (prompt, caption, text); there are image, title" in refusal(data.rename_column("text", "title"))
    assert "row 3 has an empty caption" in refusal(table(hf, folder, text=[*captions[:3], " ", "e"]))
    assert "row 2: its caption is no text, but a NoneType" in refusal(table(hf, folder, text=[*captions[:2], None, "d", "e"]))
    broken = encoded([b"no picture", *sorted(folder.glob("*.png"))[1:]])
    features = hf.Features({"image": hf.Image(), "text": hf.Value("string")})
    assert "row 0 is no readable picture" in refusal(hf.Dataset.from_dict({"image": broken, "text": captions}, features=features))
    gone = [None, *encoded(sorted(folder.glob("*.png"))[1:])]
    assert "row 0 is no readable picture: it is empty" in refusal(
        hf.Dataset.from_dict({"image": gone, "text": captions}, features=features)
    )
    assert "no split 'test'; there are train" in refusal(hf.DatasetDict({"train": data}), ":test")
    with pytest.raises(ValueError, match="hf:nobody/nothing:train cannot be read: "):
        read_captions("hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:nobody/nothing:train needs the datasets library: pip install datasets"):
        read_captions("hf:nobody/nothing")


# -- latents on disk -------------------------------------------------------------------------------------------------


def test_pictures_are_encoded_once_whatever_they_are_called(folder, tmp_path):
    plain = load_samples(Encoder(), "", str(folder), SQUARE)
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache")
    for path in ("0.png", "0.txt"):
        (folder / path).rename(folder / f"moved {path}")
    (tmp_path / "cache" / "left by a kill.partial").write_bytes(b"half")
    for _ in range(2):
        samples = load_samples(encoder, "", str(folder), SQUARE, cache)
        for i, prompt in enumerate(samples.prompts):
            ours, theirs = samples.picture[i], plain.picture[plain.prompts.index(prompt)]
            assert torch.equal(samples.mean[ours], plain.mean[theirs]) and torch.equal(samples.std[ours], plain.std[theirs])
    assert encoder.seen == 5 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    picture(folder / "1.png", 99)  # another picture under an old name
    load_samples(encoder, "", str(folder), SQUARE, cache)
    assert encoder.seen == 6
    load_samples(encoder, "", str(folder), [(4, 4)], cache)  # another size
    encoder.name = "another vae"
    load_samples(encoder, "", str(folder), SQUARE, cache)
    assert encoder.seen == 16


def test_damaged_latents_are_encoded_again(folder, tmp_path):
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache")
    whole = load_samples(encoder, "", str(folder), SQUARE, cache)
    for name, content in zip(sorted((tmp_path / "cache").iterdir()), (b"", b"garbage", None)):
        name.write_bytes(name.read_bytes()[:-8] if content is None else content)
    again = load_samples(encoder, "", str(folder), SQUARE, cache)
    assert all(torch.equal(a, b) for a, b in zip(again.mean, whole.mean, strict=True))
    assert encoder.seen == 8


def test_a_cache_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        TensorCache(tmp_path / "file" / "below")
    cache = TensorCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.raises(OSError, match="cannot write to"):
        load_samples(Encoder(), "", str(folder), SQUARE, cache)


# -- prompts on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_prompts_in_the_cache_need_no_text_encoder(family, family_folder, tmp_path, monkeypatch):
    prompts, cache = ["a red star", "a ring", ""], TensorCache(tmp_path / "cache")
    plain, first, second = (load_policy(family_folder(family), image_size=64) for _ in range(3))
    first.prepare(prompts, cache)
    monkeypatch.setattr(second.pipeline, "encode_prompt", None)
    second.prepare([*prompts, "a ring"], cache)
    expected, found = (policy.conditioning(prompts) for policy in (plain, second))
    assert expected.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
    assert len(list((tmp_path / "cache").iterdir())) == 3
    with pytest.raises(TypeError):
        second.conditioning(["unheard of"])


def test_of_the_prompts_in_a_cache_a_few_are_in_memory_and_a_lost_one_is_encoded_again(family_folder, tmp_path, monkeypatch):
    prompts = [f"a red star {i}" for i in range(6)]
    plain = load_policy(family_folder("sdxl")).conditioning(prompts)
    row = sum(value[0].nbytes for value in plain.values())
    monkeypatch.setattr(base, "EMBEDDINGS_KEPT", 2 * row)
    policy, folder = load_policy(family_folder("sdxl")), tmp_path / "cache"
    policy.prepare(prompts, TensorCache(folder))
    assert not policy._embeddings
    next(folder.glob("*.safetensors")).unlink()
    for order in (prompts, prompts[::-1]):
        for prompt in order:
            for name, value in policy.conditioning([prompt]).items():
                assert torch.equal(value[0], plain[name][prompts.index(prompt)])
            assert len(policy._embeddings) <= 2
    for name, value in policy.conditioning(prompts).items():  # more of them than are kept
        assert torch.equal(value, plain[name])


def test_prompts_are_encoded_again_where_anything_that_they_depend_on_changes(family_folder, tmp_path):
    folder, cache, seen = family_folder("sd3"), TensorCache(tmp_path / "cache"), []

    def encoded(change=lambda policy: None, dtype=torch.float32):
        policy = load_policy(folder, image_size=64, dtype=dtype)
        change(policy)
        encode = policy._encode_prompts
        policy._encode_prompts = lambda prompts: seen.extend(prompts) or encode(prompts)
        policy.prepare(["a red star", ""], cache)
        return [seen.pop() for _ in list(seen)]

    assert len(encoded()) == 2 and encoded() == []
    assert encoded(lambda p: setattr(p.pipeline.text_encoder_2.config, "_name_or_path", "moved")) == []
    assert len(encoded(dtype=torch.bfloat16)) == 2
    assert len(encoded(lambda p: p.pipeline.text_encoder_3.shared.weight.data.add_(1e-3))) == 2
    assert len(encoded(lambda p: setattr(p.pipeline.text_encoder.config, "hidden_act", "gelu_new"))) == 2
    assert len(encoded(lambda p: setattr(p.pipeline.tokenizer_3, "model_max_length", 8))) == 2
    assert len(encoded(lambda p: setattr(p, "max_tokens", 128))) == 2
    assert len(encoded(lambda p: p.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None))) == 2
    damaged = sorted((tmp_path / "cache").iterdir())
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    assert len(encoded()) == 2


# -- processes -------------------------------------------------------------------------------------------------------


def encode_in_process(out, folder):
    with joined() as processes:
        encoder = Encoder()
        samples = load_samples(encoder, "", str(folder), SQUARE, TensorCache(out / "cache"), processes)
        torch.save({"seen": encoder.seen, "mean": torch.stack(samples.mean)}, out / f"{processes.rank}.pt")


def test_processes_share_the_encoding(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert finish(start(2, encode_in_process, tmp_path / "out", folder)) == [0, 0], said(tmp_path / "out", 0)
    found = [torch.load(tmp_path / "out" / f"{rank}.pt") for rank in range(2)]
    assert sorted(f["seen"] for f in found) == [2, 3]
    expected = torch.stack(load_samples(Encoder(), "", str(folder), SQUARE).mean)
    assert all(torch.equal(f["mean"], expected) for f in found)
