"""Scoring by shards on Ray Data: one model per worker, a table per shard, resumed by shard, and safe from a worker's death."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..rewards.registry import load
from ..rewards.weighted import RewardSpec
from ..runtime.files import check_weights
from .scorer import ScoredImage, score
from .shards import Shard, refused, restored, staged
from .table import Table

SETTINGS, ERRORS, TRIES, _UNFINISHED = "scores.json", ".errors.jsonl", ".tries", ".writing"
RETRIES = 3  # of a shard whose worker died, before the shard is taken to be what kills it; Ray itself tries without end
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Scoring:
    """The settings that all workers share. `rewards`: names and weights; `form`: parquet or csv."""

    rewards: tuple[tuple[str, float], ...]
    out: str
    form: str = "parquet"
    raw: bool = False
    size: int = 0
    prompt: str | None = None
    prompt_column: str = ""
    batch: int = 32
    device: str = "cpu"
    allow_remote: bool = False


class Folder:
    """The folder of the tables, local or an object store's."""

    def __init__(self, out: str) -> None:
        found = import_module("fsspec.core").url_to_fs(out)
        self.fs, self.root = found[0], str(found[1]).rstrip("/")
        self.local = "file" in ((self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol)

    def names(self) -> set[str]:
        """The files in it."""
        self.fs.invalidate_cache()
        return {str(path).rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)} if self.fs.exists(self.root) else set()

    def read(self, name: str) -> bytes:
        """A file's content."""
        return self.fs.cat_file(f"{self.root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """A file whole or not at all: renamed on a disk; object stores show no unfinished object."""
        if not self.local:
            self.fs.pipe_file(f"{self.root}/{name}", data)
            return
        unfinished = f"{self.root}/{name}.{os.getpid()}{_UNFINISHED}"
        Path(unfinished).write_bytes(data)
        os.replace(unfinished, f"{self.root}/{name}")

    def count(self, name: str) -> int:
        """How often this was called before for a file of that name, which holds the number."""
        before = int(self.read(name)) if self.fs.exists(f"{self.root}/{name}") else 0
        self.write(name, str(before + 1).encode())
        return before

    def remove(self, names: set[str]) -> None:
        """Delete files."""
        for name in names:
            self.fs.rm_file(f"{self.root}/{name}")


class Worker:
    """Holds the rewards, and scores one shard after the other."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring, self.folder = scoring, Folder(scoring.out)
        opened = [(load(name, scoring.device, allow_remote=scoring.allow_remote), weight) for name, weight in scoring.rewards]
        parts = [replace(part, weight=weight) for part, weight in opened]
        self.parts = [replace(part, size=scoring.size or part.size) for part in parts]
        self.table = Table(self.parts, scoring.raw)

    def rows(self, shard: Shard) -> Iterator[ScoredImage]:
        """Scores of the shard's images, in order; raises where the shard is damaged."""
        s = self.scoring
        for items, keys in staged(shard, s.prompt, s.batch, s.prompt_column):
            scored = score(items, self.parts, s.device, s.batch)
            yield from (restored(row, item, key) for row, item, key in zip(scored, items, keys))

    def __call__(self, shard: Shard) -> str:
        """Write the shard's table, and beside it the images that were not scored; returns why the shard could not be read, or ""."""
        if (tries := self.folder.count(shard.name + TRIES)) > RETRIES:
            return f"its worker died {tries} times"
        try:
            rows = list(self.rows(shard))
        except Exception as error:  # readers of tars, parquet and object stores raise anything for a damaged file
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        bad = [asdict(row) for row in rows if row.error]
        if bad:
            self.folder.write(shard.name + ERRORS, "".join(json.dumps(row) + "\n" for row in bad).encode())
        self.folder.write(f"{shard.name}.{self.scoring.form}", self.encoded([row for row in rows if not row.error]))
        self.folder.remove({shard.name + TRIES})
        return ""

    def encoded(self, rows: Sequence[ScoredImage]) -> bytes:
        """The rows as a file of `form`; parquet keeps all digits."""
        if self.scoring.form == "csv":
            text = io.StringIO(newline="")
            self.table.write_to(rows, text)
            return text.getvalue().encode("utf-8", "backslashreplace")
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        lines, buffer = [self.table.line(row) for row in rows], io.BytesIO()
        kinds: list[Any] = [(name, arrow.string() if name in ("path", "prompt") else arrow.float64()) for name in self.table.columns]
        columns: dict[str, list[Any]] = {name: [line[name] for line in lines] for name in self.table.columns}
        parquet.write_table(arrow.table(columns, schema=arrow.schema(kinds)), buffer)
        return buffer.getvalue()


# -- the run ------------------------------------------------------------------------------------------------------------

Engine = Callable[[Sequence[Shard], Scoring], Iterator[tuple[str, str]]]
"""Shards and settings -> name of each shard and why it could not be read, as they end."""


@dataclass(frozen=True)
class Outcome:
    """`unread`: why, by shard; `bad`: images that were not scored; `done`: shards whose table is written, `before` this run or now."""

    done: int
    before: int
    unread: Mapping[str, str]
    bad: Sequence[ScoredImage]


def score_shards(
    shards: Sequence[Shard], scoring: Scoring, settings: Mapping[str, Any], engine: Engine, *, resume: bool = False, overwrite: bool = False
) -> Outcome:
    """Score what has no table yet; ConfigError where the folder holds other scores. Tables of shards that are no more are deleted."""
    folder = Folder(scoring.out)
    refusal = f"--out {scoring.out} cannot be written"
    names = refused(refusal, folder.names)
    if SETTINGS in names and not (resume or overwrite):
        raise ConfigError(f"{scoring.out} holds scores: add --resume to go on, or --overwrite to start again")
    before = json.loads(folder.read(SETTINGS)) if SETTINGS in names and resume else {}
    described = json.loads(json.dumps({**settings, "form": scoring.form, "raw": scoring.raw}))
    earlier: dict[str, Any] = before.get("settings", described)
    remedy = "add --overwrite to score again; the earlier reward stays loadable by its folder or file: --reward PATH"
    check_weights(Path(scoring.out) / SETTINGS, earlier.get("weights"), described.get("weights", {}), remedy)
    for key, value in described.items():
        if key != "weights" and earlier.get(key) != value:
            raise ConfigError(f"{scoring.out} was scored with {key} {earlier.get(key)!r}, now {value!r}: give the same")
    tables = {f"{shard.name}.{scoring.form}" for shard in shards}
    known = set(json.loads(folder.read(SETTINGS))["shards"]) if SETTINGS in names else set[str]()
    old = {name for name in names if name.split(".")[0] in known or name.endswith(_UNFINISHED)}
    kept = {name for name in old if name in tables or name.removesuffix(ERRORS) + f".{scoring.form}" in tables} if resume else set[str]()
    refused(refusal, lambda: folder.fs.makedirs(folder.root, exist_ok=True))
    refused(refusal, lambda: folder.remove(old - kept))
    text = json.dumps({"settings": described, "shards": [shard.name for shard in shards]}, indent=1)
    refused(refusal, lambda: folder.write(SETTINGS, text.encode()))  # before any work: the folder is refused here
    left = [shard for shard in shards if f"{shard.name}.{scoring.form}" not in kept]
    unread = {name: reason for name, reason in engine(left, scoring) if reason} if left else dict[str, str]()
    written = folder.names()
    for shard in left:
        if f"{shard.name}.{scoring.form}" not in written:
            unread.setdefault(shard.name, "its worker ended without a table")
    lines = [line for name in sorted(written) if name.endswith(ERRORS) for line in folder.read(name).splitlines()]
    bad = [ScoredImage(**json.loads(line)) for line in lines]
    return Outcome(len(shards) - len(unread), len(shards) - len(left), unread, bad)


def in_process(shards: Sequence[Shard], scoring: Scoring) -> Iterator[tuple[str, str]]:
    """The engine without Ray: one shard after the other, here."""
    worker = Worker(scoring)
    yield from ((shard.name, worker(shard)) for shard in shards)


def check_ray() -> None:
    """ConfigError where Ray is not installed."""
    try:
        for name in ("ray.data", "pyarrow"):
            import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f'--engine ray needs {error.name}: pip install "ray[data]" pyarrow') from error


def on_ray(workers: int) -> Engine:
    """Ray Data with `workers` actors, on the cluster of RAY_ADDRESS or one that is started here."""

    def run(shards: Sequence[Shard], scoring: Scoring) -> Iterator[tuple[str, str]]:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        library, data = import_module("ray"), import_module("ray.data")
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        library.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, logging_level=logging.ERROR, **here)
        try:
            gpus = int(scoring.device.startswith("cuda"))
            for kind, wanted in (("CPU", workers), ("GPU", gpus * workers)):  # Ray would wait for what is not there
                if (there := library.cluster_resources().get(kind, 0)) < wanted:
                    raise ConfigError(f"--workers {workers} need {wanted} of Ray's {kind}s, the cluster has {there:g}: give fewer")
            context: Any = data.DataContext.get_current()
            context.enable_progress_bars, context.max_errored_blocks = False, -1  # the driver lists what is lacking
            for name in ("ray", "ray.data"):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # whose tracebacks end as one line below
            rows: Any = data.from_items([{"shard": shard.text()} for shard in shards], override_num_blocks=len(shards))
            scored = rows.map_batches(
                _Actor,
                fn_constructor_args=(scoring, os.getcwd()),
                batch_size=1,
                compute=data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                num_gpus=gpus,
            )
            yield from ((row["name"], row["reason"]) for row in scored.iter_rows())
        except library.exceptions.RayError as error:
            raise ConfigError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
        finally:
            library.shutdown()

    return run


class _Actor:
    """A worker as Ray Data calls it: columns of one shard each."""

    def __init__(self, scoring: Scoring, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # where relative paths start
        self.worker = Worker(scoring)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        shards = [Shard.parse(str(text)) for text in batch["shard"]]
        return {"name": [shard.name for shard in shards], "reason": [self.worker(shard) for shard in shards]}


def named_parts(rewards: Sequence[tuple[str, float]], allow_remote: bool = False) -> list[RewardSpec]:
    """The rewards without weights' values, for their names and columns; those of Python files as they are."""
    places = [("cpu" if name.endswith(".py") else "meta") for name, _ in rewards]
    return [
        replace(load(name, place, allow_remote=allow_remote), weight=weight) for (name, weight), place in zip(rewards, places, strict=True)
    ]
