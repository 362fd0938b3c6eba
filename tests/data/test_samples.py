"""Images are encoded once, in small batches, and their latents are read from disk when a batch needs them."""

from __future__ import annotations

import gc
import hashlib

import pytest
import torch
from helpers.images import SQUARE, Encoder, write_image
from helpers.processes import finish, said, start

from trainer.data import latents
from trainer.data.cache import TensorCache
from trainer.data.latents import CachedLatents, LatentsInMemory
from trainer.data.samples import Samples, load_samples
from trainer.runtime.processes import joined


@pytest.mark.parametrize("sizes", [SQUARE, ((8, 8), (4, 16))])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_unreadable_images_are_named(content, cached, sizes, folder, tmp_path):
    good = (folder / "3.png").read_bytes()
    (folder / "3.png").unlink()
    (folder / "3.png").write_bytes(good[: len(good) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=r"3\.png is not a readable image: "):
        load_samples(Encoder(), "", str(folder), sizes, TensorCache(tmp_path / "cache") if cached else None)


def test_few_images_are_in_memory_at_once(folder, monkeypatch):
    most, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, images: most.append(tuple(images.shape)) or encode(self, images))
    monkeypatch.setattr("trainer.data.samples.PIXELS_PER_BATCH", 2 * 64)
    load_samples(Encoder(), "", str(folder), SQUARE)
    assert [shape[0] for shape in most] == [2, 2, 1]


# -- latents on disk ---------------------------------------------------------------------------------------------------


def test_images_are_encoded_once_whatever_they_are_called(folder, tmp_path):
    plain = load_samples(Encoder(), "", str(folder), SQUARE)
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache")
    for path in ("0.png", "0.txt"):
        (folder / path).rename(folder / f"moved {path}")
    (tmp_path / "cache" / "left by a kill.partial").write_bytes(b"half")
    for _ in range(2):
        samples = load_samples(encoder, "", str(folder), SQUARE, cache)
        for i, prompt in enumerate(samples.prompts):
            ours = samples.latents[int(samples.image[i])]
            theirs = plain.latents[int(plain.image[plain.prompts.index(prompt)])]
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert encoder.seen == 5 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    write_image(folder / "1.png", 99)  # another image under an old name
    load_samples(encoder, "", str(folder), SQUARE, cache)
    assert encoder.seen == 6
    load_samples(encoder, "", str(folder), [(4, 4)], cache)  # another size
    encoder.name = "another vae"
    load_samples(encoder, "", str(folder), SQUARE, cache)
    assert encoder.seen == 16


def test_damaged_latents_are_encoded_again(folder, tmp_path):
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache")
    whole = load_samples(encoder, "", str(folder), SQUARE, cache)
    assert [len(whole.latents[i]) for i in range(5)] == [2] * 5  # read, and in memory
    for name, content in zip(sorted((tmp_path / "cache").iterdir()), (b"", b"garbage", None)):
        name.write_bytes(name.read_bytes()[:-8] if content is None else content)
    again = load_samples(encoder, "", str(folder), SQUARE, cache)
    assert all(torch.equal(a, b) for i in range(5) for a, b in zip(again.latents[i], whole.latents[i], strict=True))
    assert encoder.seen == 8


def test_a_cache_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        TensorCache(tmp_path / "file" / "below")
    cache = TensorCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.raises(OSError, match="cannot write to"):
        load_samples(Encoder(), "", str(folder), SQUARE, cache)


def test_cached_latents_of_a_thousand_images_stay_on_disk(tmp_path, monkeypatch):
    """At most LATENTS_KEPT bytes and one batch are in memory, and every batch is the one that memory would give."""
    n, shape = 1000, (4, 16, 16)
    one = 2 * 4 * 4 * 16 * 16  # bytes of a mean and a standard deviation
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(n, *shape, generator=rng), torch.rand(n, *shape, generator=rng)
    cache, keys = TensorCache(tmp_path), [f"{i:04d}" for i in range(n)]
    shapes = cache.fill(keys, lambda part: [{"mean": mean[i], "std": std[i]} for i in part])
    assert shapes == [{"mean": shape, "std": shape}] * n
    prompts = tuple(map(str, range(n)))
    expected = [Samples(prompts, LatentsInMemory(mean, std)).batch(1, 0, number, 8).latents for number in range(250)]
    monkeypatch.setattr(latents, "LATENTS_KEPT", 50 * one + 1)
    lazy = Samples(prompts, CachedLatents(cache, keys, shapes))
    lazy.bucket  # noqa: B018  # kept too: 8 bytes a sample
    before = tensor_bytes()
    for number in range(250):  # two epochs
        assert torch.equal(lazy.batch(1, 0, number, 8).latents, expected[number])
    assert tensor_bytes() - before == 50 * one


def tensor_bytes():
    gc.collect()
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}.values())


def test_the_cache_opens_each_file_once_before_training(folder, tmp_path, monkeypatch):
    load_samples(Encoder(), "", str(folder), SQUARE, TensorCache(tmp_path / "cache"))
    cache, opened, read = TensorCache(tmp_path / "cache"), [], []
    shapes = cache.shapes
    monkeypatch.setattr(cache, "shapes", lambda key: opened.append(key) or shapes(key))
    monkeypatch.setattr(cache, "read", lambda key: read.append(key))
    load_samples(Encoder(), "", str(folder), SQUARE, cache)
    assert len(opened) == len(set(opened)) == 5 and not read


def test_caches_of_0_1_0_are_still_valid(folder, tmp_path):
    """Its keys: the content of the file, the size and the autoencoder."""
    load_samples(Encoder("vae"), "", str(folder), SQUARE, TensorCache(tmp_path / "cache"))
    contents = [hashlib.sha256((folder / f"{i}.png").read_bytes()).hexdigest() for i in range(5)]
    keys = {hashlib.sha256(f"picture\0{content}\0(8, 8)\0vae".encode()).hexdigest() for content in contents}
    assert {path.stem for path in (tmp_path / "cache").iterdir()} == keys


def test_latents_that_are_gone_are_one_line(folder, tmp_path):
    samples = load_samples(Encoder(), "", str(folder), SQUARE, TensorCache(tmp_path / "cache"))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(OSError, match=r"latents of this run are gone from .*cache: start it again, or --resume it, to encode them"):
        samples.batch(0, 0, 0, 2)


# -- processes ---------------------------------------------------------------------------------------------------------


def encode_in_process(out, folder):
    with joined() as processes:
        encoder = Encoder()
        samples = load_samples(encoder, "", str(folder), SQUARE, TensorCache(out / "cache"), processes)
        torch.save({"seen": encoder.seen, "mean": torch.stack([samples.latents[i][0] for i in range(5)])}, out / f"{processes.rank}.pt")


def test_processes_share_the_encoding(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert finish(start(2, encode_in_process, tmp_path / "out", folder)) == [0, 0], said(tmp_path / "out", 0)
    found = [torch.load(tmp_path / "out" / f"{rank}.pt") for rank in range(2)]
    assert sorted(f["seen"] for f in found) == [2, 3]
    expected = torch.stack(load_samples(Encoder(), "", str(folder), SQUARE).latents.mean)
    assert all(torch.equal(f["mean"], expected) for f in found)


def test_an_image_that_changes_while_it_is_encoded_is_not_cached(tmp_path):
    """A cache would keep the new image under the old one's hash for good."""
    write_image(tmp_path / "set" / "a.png", 0, "a star")
    write_image(tmp_path / "set" / "b.png", 1, "a ring")
    encoder, cache = Encoder(), TensorCache(tmp_path / "cache")
    encode = encoder.encode

    def edited(pictures):
        write_image(tmp_path / "set" / "b.png", 2, "a ring")
        return encode(pictures)

    encoder.encode = edited
    with pytest.raises(ValueError, match="b.png changed while the images were encoded: start again"):
        load_samples(encoder, "", str(tmp_path / "set"), SQUARE, cache)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
