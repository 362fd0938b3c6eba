"""Scoring by shards without Ray: what is a shard, that rows are the scorer's, resuming, and what is refused. `memory://` is fsspec's."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import fsspec
import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.data.report import Report
from trainer.rewards.registry import load
from trainer.scoring.items import Item
from trainer.scoring.ray_engine import Scoring, Worker, in_process, score_shards
from trainer.scoring.scorer import score
from trainer.scoring.shards import find_shards

SETTINGS = {"rewards": ["bright"], "weights": {}}


def png(level, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, 20, 200 - level)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def bright(tmp_path):
    (tmp_path / "bright.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3)) + 0.1 * images[:, 0, 0, 0]\n")
    return str(tmp_path / "bright.py")


@pytest.fixture
def store(tmp_path):
    """Seven images in an object store as a folder, a WebDataset and a table, and the same on the disk."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for i in range(3):
        fs.pipe_file(f"/data/folder/{i}.png", png(10 * i))
        fs.pipe_file(f"/data/folder/{i}.txt", f"prompt {i}".encode())
    wds = [("a/3.png", png(30)), ("a/3.json", b'{"caption": "prompt 3"}'), ("a/4.jpg.png", png(40)), ("a/4.txt", b"prompt 4")]
    fs.pipe_file("/data/shard-0.tar", tar_of(wds))
    rows = [{"image": "folder/5.png", "prompt": "prompt 5"}, {"image": "memory://other/6.png", "prompt": "prompt 6"}]
    fs.pipe_file("/table/list.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    fs.pipe_file("/table/folder/5.png", png(50))
    fs.pipe_file("/other/6.png", png(60))
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(png(10 * i))
    return fs


PATHS = ["memory://data", "memory://table/list.jsonl"]


def tables(fs, out="/scores"):
    found = {}
    for path in fs.ls(out, detail=False):
        if path.endswith(".csv"):
            found[path.rpartition("/")[2]] = list(csv.DictReader(fs.cat_file(path).decode().splitlines()))
    return found


def test_rows_of_an_object_store_are_the_scorers_bit_for_bit(store, bright, tmp_path):
    shards = find_shards(PATHS, 32, Report())
    assert [bool(shard.path) for shard in shards] == [True, False] and len(shards[1].images) == 5
    worker = Worker(Scoring(((bright, 1.0),), "memory://scores", "csv"))
    ours = {row.path: row for shard in shards for row in worker.rows(shard)}
    expected = list(score([Item(tmp_path / f"{i}.png", f"prompt {i}") for i in range(7)], [load(bright)]))
    keys = [f"memory://data/folder/{i}.png" for i in range(3)]
    keys += [
        "memory://data/shard-0.tar/a/3.png",
        "memory://data/shard-0.tar/a/4.jpg.png",
        "memory://table/folder/5.png",
        "memory://other/6.png",
    ]
    assert list(ours) == [*keys[3:5], *keys[:3], *keys[5:]]
    assert [(ours[key].prompt, ours[key].raw) for key in keys] == [(row.prompt, row.raw) for row in expected]


def test_other_fields_of_a_sample_are_not_images_of_their_own(bright, store):
    files = [("a.png", png(1)), ("a.seg.png", png(2)), ("a.depth.jpg", png(3)), ("a.txt", b"a"), ("b.thumb.png", png(4)), ("b.txt", b"b")]
    store.pipe_file("/masks/x.tar", tar_of(files))
    (shard,) = find_shards(["memory://masks/x.tar"], 32, Report())
    rows = list(Worker(Scoring(((bright, 1.0),), "memory://scores", "csv")).rows(shard))
    assert [row.path.rpartition("/")[2] for row in rows] == ["a.png", "b.thumb.png"]  # b has no image but that


def test_a_shard_whose_table_is_there_is_not_scored_again(store, bright):
    scored = []

    def engine(shards, scoring):
        scored.append([shard.name for shard in shards])
        yield from in_process(shards[:1] if len(scored) == 1 else shards, scoring)

    scoring = Scoring(((bright, 1.0),), "memory://scores", "csv")
    run = lambda **flags: score_shards(find_shards(PATHS, 2, Report()), scoring, SETTINGS, engine, **flags)  # noqa: E731
    first = run()
    assert len(scored[0]) == 4 and first.done == 1 and set(first.unread.values()) == {"its worker ended without a table"}
    second = run(resume=True)
    assert scored[1] == scored[0][1:] and second == type(second)(4, 1, {}, [])
    whole = tables(store)
    assert len(whole) == 4 and sum(map(len, whole.values())) == 7
    assert run(resume=True).before == 4 and len(scored) == 2
    store.pipe_file("/data/folder/0.png", png(99, (9, 9)))
    assert run(resume=True).before == 3
    again = tables(store)
    assert len(again) == 4 and len(again.keys() - whole.keys()) == 1  # the old table of that shard is gone
    with pytest.raises(ConfigError, match="holds scores: add --resume to go on, or --overwrite"):
        run()
    with pytest.raises(ConfigError, match="was scored with form 'csv', now 'parquet': give the same"):
        score_shards([], Scoring((), "memory://scores"), SETTINGS, engine, resume=True)
    run(overwrite=True)
    assert len(scored[-1]) == 4


def test_a_damaged_shard_and_an_image_are_listed_and_the_rest_goes_on(store, bright):
    store.pipe_file("/data/cut.tar", tar_of([("1.png", png(1)), ("2.png", png(2))])[:900])
    store.pipe_file(
        "/data/broken.tar", tar_of([("1.png", png(1)[:40]), ("1.txt", b"a"), ("2.png", png(2)), ("2.txt", b"b"), ("in/3.png", png(3))])
    )
    scoring = Scoring(((bright, 1.0),), "memory://scores", "csv")
    shards = find_shards(PATHS, 32, Report())
    for flags in ({}, {"resume": True}):
        found = score_shards(shards, scoring, SETTINGS, in_process, **flags)
        assert found.done == 3 and [name.split("-")[0] for name in found.unread] == ["cut"]
        bad, other = found.bad
        assert other.error == "memory://data/broken.tar/in/3.png has no prompt: give --prompt, a manifest, or 3.txt beside it"
        assert bad.error.startswith("memory://data/broken.tar/1.png is not a readable image") and "\n" not in bad.error
    assert sum(map(len, tables(store).values())) == 8


class Refusing(fsspec.AbstractFileSystem):
    protocol = "refusing"

    def info(self, path, **kwargs):
        raise PermissionError("Forbidden\nrequest 123")

    ls = exists = mkdir = makedirs = info


def test_a_shard_that_kills_its_worker_is_given_up_after_four(store, bright, monkeypatch):
    scoring, shards = Scoring(((bright, 1.0),), "memory://scores", "csv"), find_shards(PATHS, 32, Report())
    died = []

    def rows(self, shard):
        if shard.path:
            died.append(shard.name)
            raise KeyboardInterrupt  # nothing more of this worker runs
        return alive(self, shard)

    def engine(shards, scoring):
        for shard in shards:
            for _ in range(9):
                try:
                    yield shard.name, Worker(scoring)(shard)
                    break
                except KeyboardInterrupt:
                    continue

    alive = Worker.rows
    monkeypatch.setattr(Worker, "rows", rows)
    found = score_shards(shards, scoring, SETTINGS, engine)
    assert found.unread == {shards[0].name: "its worker died 4 times"} and len(died) == 4 and found.done == 1
    monkeypatch.undo()
    found = score_shards(shards, scoring, SETTINGS, in_process, resume=True)
    assert (found.done, found.before, found.unread) == (2, 1, {})
    assert not [name for name in store.ls("/scores", detail=False) if name.endswith(".tries")]


def test_what_a_store_or_a_flag_refuses_is_one_line(store, bright, tmp_path, capsys, monkeypatch):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    for path, message in {
        "refusing://bucket/a.tar": "refusing://bucket/a.tar cannot be read: Forbidden",
        "memory://nowhere.tar": "memory://nowhere.tar cannot be read: ",
        "nothing://a": "nothing://a cannot be read: Protocol not known: nothing",
        str(tmp_path / "none.tar"): "none.tar cannot be read: no file",
    }.items():
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as error:
            find_shards([path], 4, Report())
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="--out refusing://bucket cannot be written: Forbidden"):
        score_shards(find_shards(PATHS, 4, Report()), Scoring(((bright, 1.0),), "refusing://bucket", "csv"), SETTINGS, in_process)
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    ray = ["score", str(tmp_path), "--engine", "ray", "--reward", bright]
    for flags, message in (
        (["--top", "2"], "--top and --write-back need the images on this machine"),
        ([], "give one --out FOLDER"),
        (["--out", str(tmp_path / "o"), "--workers", "0"], "need at least 1"),
        (["--out", str(tmp_path / "o")], 'pip install "ray[data]" pyarrow'),
    ):
        assert main([*ray, *flags]) == 2
        assert message in capsys.readouterr().err
