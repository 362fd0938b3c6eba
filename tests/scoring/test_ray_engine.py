"""Scoring on Ray: the rows of one process, a worker's death, and a run that is killed again and again. Needs the extra `scale`.

Ray's workers are other processes, which do not see fsspec's memory store: local folders and `file://` stand for the object store here.
"""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("ray.data", reason="Ray is not installed: pip install -e .[scale]")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install -e .[scale]")
pytestmark = pytest.mark.full

from trainer.__main__ import main  # noqa: E402
from trainer.rewards.registry import load  # noqa: E402
from trainer.scoring.items import find_items  # noqa: E402
from trainer.scoring.scorer import score  # noqa: E402

ROOT = Path(__file__).parents[2]
SLOW = """import os, time
from pathlib import Path
HERE = Path(__file__).parent


def reward(images, prompts):
    (HERE / f"{os.getpid()}.pid").write_text("")
    time.sleep(float((HERE / "seconds").read_text()))
    return images.mean((1, 2, 3)) + 0.1 * images[:, 0, 0, 0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Forty images, and a reward that says who computes it."""
    rng = random.Random(0)
    (tmp_path / "in").mkdir()
    for i in range(40):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (16, 16), color).save(tmp_path / "in" / f"{i:02d}.png")
        (tmp_path / "in" / f"{i:02d}.txt").write_text(f"prompt {i}")
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "seconds").write_text("0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_worker_niceness", "0")
    return tmp_path


def ray_score(out, *flags, paths=("in",), reward="slow.py"):
    return ["score", *paths, "--engine", "ray", "--reward", reward, "--out", str(out), "--shard-size", "8", "--batch", "4", *flags]


def rows(out):
    """The rows of all tables, by key."""
    found = [row for path in Path(out).glob("*.parquet") for row in parquet.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: row["path"])


def test_one_worker_has_the_rows_of_one_process_and_two_the_same_table(folder, capfd):
    expected = [(row.path, row.prompt, row.raw["demo-proxy"]) for row in score(find_items(["in"]), [load("demo-proxy")], batch=4)]
    for workers in (1, 2):
        out = folder / f"out-{workers}"
        assert main(ray_score(out, "--workers", str(workers), reward="demo-proxy")) == 0
        assert [(row["path"], row["prompt"], row["demo-proxy"]) for row in rows(out)] == expected
        assert len(list(out.glob("*.parquet"))) == 5 and not list(out.glob("*.tries"))
    assert rows(folder / "out-1") == rows(folder / "out-2")
    said = capfd.readouterr()
    assert "scored 5 of 5 shards; wrote" in said.out
    assert not [line for line in said.err.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]  # Ray's own word
    assert main(["score", "in", "--out", "one.csv", "--batch", "4"]) == 0
    assert main(ray_score(folder / "csv", "--form", "csv", reward="demo-proxy")) == 0
    lines = [line for path in (folder / "csv").glob("*.csv") for line in csv.DictReader(io.StringIO(path.read_text()))]
    assert sorted(lines, key=lambda row: row["path"]) == list(csv.DictReader(io.StringIO((folder / "one.csv").read_text())))


def test_parquet_tars_and_urls_are_read_and_a_damaged_one_is_listed(folder, capfd):
    import pyarrow

    images = sorted((folder / "in").glob("*.png"))
    encoded = [{"bytes": path.read_bytes(), "path": path.name} for path in images[:10]]
    encoded.append(None)
    table = pyarrow.table({"image": encoded, "text": [f"prompt {i}" for i in range(11)]})
    parquet.write_table(table, folder / "set.parquet")
    with tarfile.open(folder / "set.tar", "w") as tar:
        for path in images[10:20]:
            tar.add(path, path.name)
            tar.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    (folder / "cut.parquet").write_bytes((folder / "set.parquet").read_bytes()[:-50])
    lines = [f'{{"file_name": "in/{path.name}", "caption": "{path.with_suffix(".txt").read_text()}"}}\n' for path in images[20:]]
    (folder / "list.jsonl").write_text("".join(lines))
    paths = (f"file://{folder}/set.parquet", "set.tar", f"file://{folder}/list.jsonl", "cut.parquet")
    assert main(ray_score(f"file://{folder}/out", paths=paths)) == 1
    told = capfd.readouterr().err
    assert "shard not scored: cut.parquet: " in told and "set.parquet#10 is not a readable image" in told
    expected = {row.prompt: row.raw["slow.py"] for row in score(find_items(["in"]), [load("slow.py")], batch=4)}
    assert {row["prompt"]: row["slow.py"] for row in rows(folder / "out")} == expected and len(rows(folder / "out")) == 40


def test_what_the_cluster_or_a_worker_lacks_is_one_line(folder, capfd):
    assert main(ray_score(folder / "out", "--device", "cuda", "--workers", "2")) == 2
    assert "error: --workers 2 need 2 of Ray's GPUs, the cluster has 0: give fewer" in capfd.readouterr().err
    (folder / "bad.py").write_text("import sys\nif 'default_worker' in sys.argv[0]:\n    raise ImportError('no such thing')\n" + SLOW)
    assert main(ray_score(folder / "out", "--overwrite", reward="bad.py")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]
    assert line == "error: --engine ray: ValueError: bad.py fails when it is imported: ImportError: no such thing (line 3)"


def test_a_killed_worker_is_replaced_and_the_table_is_the_same(folder, capfd):
    expected = [(row.path, row.raw["slow.py"]) for row in score(find_items(["in"]), [load("slow.py")], batch=4)]
    (folder / "seconds").write_text("0.4")
    for path in folder.glob("*.pid"):
        path.unlink()
    process = start(folder, ray_score(folder / "out"))
    try:
        killed = await_worker(folder)
        time.sleep(0.6)
        os.kill(killed, signal.SIGKILL)
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert [(row["path"], row["slow.py"]) for row in rows(folder / "out")] == expected
    assert len(list(folder.glob("*.pid"))) == 2


def start(folder, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def await_worker(folder, before=(), process=None, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and (process is None or process.poll() is None):
        if found := {int(path.stem) for path in folder.glob("*.pid")} - set(before):
            return found.pop()
        time.sleep(0.05)
    assert process is not None and process.poll() == 0, "no worker began"  # all was done before
    return 0


def test_a_run_that_is_killed_at_ten_random_moments_ends_with_the_same_table(folder):
    expected = [(row.path, row.raw["slow.py"]) for row in score(find_items(["in"]), [load("slow.py")], batch=4)]
    (folder / "seconds").write_text("0.6")
    rng, done = random.Random(1), []
    for kill in range(10):
        before = [int(path.stem) for path in folder.glob("*.pid")]
        process = start(folder, ray_score(folder / "out", "--shard-size", "4", *(["--resume"] if kill else []), "--workers", "2"))
        try:
            if rng.random() < 0.8:
                await_worker(folder, before, process)
                time.sleep(rng.uniform(0, 0.8))
            else:
                time.sleep(rng.uniform(0.5, 4))  # while Ray starts
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done.append(len(list((folder / "out").glob("*.parquet"))))
    assert len(set(done)) > 3  # kills fell into the work
    (folder / "seconds").write_text("0")
    assert start(folder, ray_score(folder / "out", "--shard-size", "4", "--resume", "--workers", "2")).wait(120) == 0
    print("tables after each kill:", done)
    assert [(row["path"], row["slow.py"]) for row in rows(folder / "out")] == expected
    assert sorted(path.suffix for path in (folder / "out").iterdir()) == [".json", *[".parquet"] * 10]
