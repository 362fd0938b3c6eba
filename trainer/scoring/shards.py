"""Shards of images: what is scored at once and, once its table is written whole, never again.

A WebDataset's tar and a parquet file are a shard each; images of folders and tables are divided. Any of them may lie where fsspec reads:
`s3://`, `gs://`, `hf://`, `memory://`. The images of a chunk are staged in a temporary folder, so that one scorer serves all.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ..config import ConfigError
from ..data.images import SIDECARS, SUFFIXES
from ..data.manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, prompt_of
from ..data.report import Report
from ..data.rows import SUFFIXES as TABLES
from ..data.rows import column_name, read_rows
from ..text import valid
from .items import Item, find_items
from .scorer import ScoredImage, state_of

TARS = (".tar", ".tar.gz", ".tgz")
_STATES = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
CHUNK = 8  # batches that are staged at once


@dataclass(frozen=True)
class Source:
    """One image that is known beforehand: its path or URL, its prompt or its caption's, and what changes with it."""

    path: str
    prompt: str | None = None
    caption: str = ""
    state: str = ""


@dataclass(frozen=True)
class Shard:
    """`path` is a tar or parquet file; "" for images of folders and tables. `name` is that of its output, and tells it from others."""

    name: str
    path: str = ""
    images: tuple[Source, ...] = ()

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `text()`."""
        values = json.loads(text)
        return cls(values["name"], values["path"], tuple(Source(**image) for image in values["images"]))


@dataclass(frozen=True)
class _Image:
    """An image on its way to the scorer; `key` is its path in the table."""

    key: str
    data: bytes | Path
    suffix: str
    prompt: str | None


# -- finding ------------------------------------------------------------------------------------------------------------


def find_shards(paths: Sequence[str], size: int, report: Report, prompt_column: str = "") -> list[Shard]:
    """The shards of folders, tars, parquet files, tables and images, in that order; images by `size`. One line of error."""
    report.source = ", ".join(paths)
    files: dict[str, str] = {}
    found: dict[Source, None] = {}
    for path in paths:
        with_error = f"{path} cannot be read"
        sources = refused(with_error, lambda path=path: list(_sources(path, files, report, prompt_column)))
        found.update(dict.fromkeys(sources))
    images = list(found)
    shards = [_named(Shard("", path), PurePosixPath(path).name.split(".")[0][:80], state) for path, state in files.items()]
    for first in range(0, len(images), size):
        shards.append(_named(Shard("", images=tuple(images[first : first + size])), f"images-{first:08d}"))
    if not shards:
        raise ConfigError(f"no image, {', '.join(TARS[:1])} or .parquet in {', '.join(paths)}")
    report.taken["images"], report.taken["shards"] = len(images), len(shards)
    return shards


def _named(shard: Shard, stem: str, state: str = "") -> Shard:
    digest = hashlib.sha256(f"{shard.text()}/{state}".encode("utf-8", "surrogateescape")).hexdigest()
    return replace(shard, name=f"{stem}-{digest[:12]}")


def _sources(path: str, files: dict[str, str], report: Report, prompt_column: str) -> Iterator[Source]:
    """The images that a path names; tars and parquet files are added to `files`, with their states."""
    if _is_local(path):
        local = Path(path)
        inside = sorted(p for p in local.rglob("*") if _is_shard(p.name)) if local.is_dir() else [local] if _is_shard(path) else []
        files.update({str(p): state_of(p) for p in inside})
        if _is_shard(path) and not local.exists():
            raise FileNotFoundError(f"no file {path}")
        others = not local.is_dir() or any(p.suffix.lower() in SUFFIXES for p in local.rglob("*"))
        if others and not _is_shard(path):
            items = find_items([path], None, prompt_column, report)
            yield from (Source(str(item.path), item.prompt, state=_with_sidecar(item.path)) for item in items)
        return
    fs, root = _filesystem(path)
    scheme = path.split("://")[0]
    if fs.isdir(root):
        listing: Mapping[str, Mapping[str, Any]] = fs.find(root, detail=True)
        for name in sorted(listing):
            url = f"{scheme}://{name.lstrip('/') if scheme != 'file' else name}"
            if _is_shard(name):
                files[url] = _state(listing[name])
            elif name.lower().endswith(SUFFIXES):
                beside = (str(PurePosixPath(name).with_suffix(suffix)) for suffix in SIDECARS)
                text = next((c for c in beside if c in listing), "")
                caption = text and f"{scheme}://{text.lstrip('/') if scheme != 'file' else text}"
                yield Source(url, caption=caption, state="/".join(_state(listing[one]) for one in (name, text) if one))
            elif not name.lower().endswith(SIDECARS):
                report.leave_out("not an image", PurePosixPath(name).name)
    elif _is_shard(path):
        files[path] = _state(fs.info(root))
    elif path.lower().endswith(TABLES):
        yield from _rows(path, fs.cat_file(root), report, prompt_column)
    else:
        yield Source(path, state=_state(fs.info(root)))


def _rows(url: str, data: bytes, report: Report, prompt_column: str) -> Iterator[Source]:
    """The images of a table that lies elsewhere; relative paths start at its folder."""
    columns = (column_name(prompt_column),) if prompt_column else PROMPT_COLUMNS
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / PurePosixPath(url).name
        local.write_bytes(data)
        for row in read_rows(local, IMAGE_COLUMNS, columns, report):
            name = next((row.values[c] for c in IMAGE_COLUMNS if row.values.get(c)), None)
            if not isinstance(name, str):
                raise ValueError(f"{row.where.replace(str(local), url)}: no image")
            prompts = (prompt_of(row.values.get(c), row.where, report) for c in columns)
            path = name if "://" in name or name.startswith("/") else f"{url.rpartition('/')[0]}/{name}"
            yield Source(path, next((prompt for prompt in prompts if prompt), None))


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*TARS, ".parquet"))


def _is_local(path: str) -> bool:
    return "://" not in path


def _filesystem(path: str) -> tuple[Any, str]:
    return import_module("fsspec.core").url_to_fs(path)


def _with_sidecar(path: Path) -> str:
    """The state of an image and of the texts beside it, which may be its caption."""
    return "/".join(state_of(one) for one in (path, *map(path.with_suffix, SIDECARS)) if one == path or one.is_file())


def _state(info: Mapping[str, Any]) -> str:
    """What an object store says of a file that changes with it."""
    return "/".join(str(info[key]) for key in _STATES if key in info)


def refused(what: str, read: Callable[[], Any]) -> Any:
    """The result of `read`, with any library's error as one line that says what cannot be done and why."""
    try:
        return read()
    except ConfigError:
        raise
    except Exception as error:  # an object store's libraries raise anything for a wrong name, key or permission
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        pip = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) and error.name else ""
        raise ConfigError(f"{what}: {reason}{pip}") from error


# -- reading ------------------------------------------------------------------------------------------------------------


def staged(shard: Shard, prompt: str | None, batch: int, prompt_column: str = "") -> Iterator[tuple[list[Item], list[str]]]:
    """Chunks of items and their keys, whole batches but for the last; temporary files go with the chunk. Raises where it is damaged."""
    images = _images(shard, prompt_column)
    while chunk := list(islice(images, CHUNK * batch)):
        with tempfile.TemporaryDirectory() as folder:
            items = [_stage(image, Path(folder) / f"{n:06d}{image.suffix}", prompt) for n, image in enumerate(chunk)]
            yield items, [image.key for image in chunk]


def restored(row: ScoredImage, item: Item, key: str) -> ScoredImage:
    """The row under the image's key rather than its temporary file's name."""
    caption = PurePosixPath(key).with_suffix(".txt").name
    return replace(row, path=key, error=row.error.replace(str(item.path), key).replace(f"{item.path.stem}.txt", caption))


def _stage(image: _Image, path: Path, prompt: str | None) -> Item:
    prompt = image.prompt if prompt is None else prompt
    if isinstance(image.data, Path):
        return Item(image.data, prompt)
    path.write_bytes(image.data)
    return Item(path, prompt)


def _images(shard: Shard, prompt_column: str) -> Iterator[_Image]:
    if shard.path:
        yield from (_parquet if shard.path.lower().endswith(".parquet") else _tar)(shard.path, prompt_column)
        return
    for source in shard.images:
        suffix = PurePosixPath(source.path).suffix
        if _is_local(source.path):
            yield _Image(source.path, Path(source.path), suffix, source.prompt)
            continue
        prompt = source.prompt if not source.caption else valid(_read(source.caption).decode("utf-8-sig")).strip() or None
        yield _Image(source.path, _read(source.path), suffix, prompt)


def _read(url: str) -> bytes:
    fs, path = _filesystem(url)
    return fs.cat_file(path)


def _tar(path: str, prompt_column: str) -> Iterator[_Image]:
    """The samples of a WebDataset: files that share a name up to its first dot; `.txt`, `.caption` or a key of `.json` is the prompt."""
    opened: Any = import_module("fsspec").open(path, "rb")
    with opened as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        name, sample = "", dict[str, tuple[str, bytes]]()
        for member in tar:
            if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                continue
            folder, _, base = member.name.rpartition("/")
            key, _, extension = base.partition(".")
            here = f"{folder}/{key}" if folder else key
            if here != name:
                yield from _sample(path, sample, prompt_column)
                name, sample = here, {}
            content = tar.extractfile(member)
            assert content is not None
            sample[f".{extension.lower()}"] = member.name, content.read()
        yield from _sample(path, sample, prompt_column)


def _sample(path: str, sample: Mapping[str, tuple[str, bytes]], prompt_column: str) -> Iterator[_Image]:
    texts = (valid(sample[suffix][1].decode("utf-8-sig")).strip() for suffix in SIDECARS if suffix in sample)
    prompt = next((text for text in texts if text), None)
    if ".json" in sample and (prompt is None or prompt_column):
        values: Any = json.loads(sample[".json"][1])
        prompt = _prompt(values if isinstance(values, dict) else {}, f"{path}/{sample['.json'][0]}", prompt_column) or prompt
    plain = any(suffix in SUFFIXES for suffix in sample)  # then x.seg.png is another field of the sample, as in the webdataset library
    for suffix, (name, data) in sample.items():
        if suffix in SUFFIXES or (not plain and suffix.endswith(SUFFIXES)):
            yield _Image(f"{path}/{name}", data, f".{suffix.rpartition('.')[2]}", prompt)


def _prompt(values: Mapping[str, Any], where: str, prompt_column: str) -> str | None:
    columns = (column_name(prompt_column),) if prompt_column else PROMPT_COLUMNS
    named = {column_name(key): value for key, value in values.items()}
    found = (prompt_of(named.get(column), where, Report()) for column in columns)
    return next((prompt for prompt in found if prompt), None)


def _parquet(path: str, prompt_column: str) -> Iterator[_Image]:
    """The rows of a parquet file: an image as bytes, as Hugging Face's struct of bytes and path, or as a path from the file's folder."""
    opened: Any = import_module("fsspec").open(path, "rb")
    with opened as file:
        table: Any = import_module("pyarrow.parquet").ParquetFile(file)
        names = {column_name(name): name for name in table.schema_arrow.names}
        column = next((names[c] for c in (*IMAGE_COLUMNS[1:], "path") if c in names), None)  # `path` beside `image` is its name
        if column is None:
            raise ValueError(f"no column {', '.join(IMAGE_COLUMNS)}; there are {', '.join(table.schema_arrow.names)}")
        number = 0
        for group in table.iter_batches(batch_size=64):
            for row in cast(Iterable[dict[str, Any]], group.to_pylist()):
                yield _of_row(path, number, row[column], _prompt(row, f"{path}, row {number}", prompt_column))
                number += 1


def _of_row(path: str, number: int, value: Any, prompt: str | None) -> _Image:
    key, name = f"{path}#{number}", ""
    if isinstance(value, dict):
        name, value = str(cast(Any, value).get("path") or ""), cast(Any, value).get("bytes") or cast(Any, value).get("path")
    if isinstance(value, str):
        name = value if "://" in value or value.startswith("/") else f"{path.rpartition('/')[0] or '.'}/{value}"
        return _Image(name, Path(name) if _is_local(name) else _read(name), PurePosixPath(name).suffix, prompt)
    if value is None:  # one image is missing, the others are not: it is listed as one that cannot be read
        value = b""
    if not isinstance(value, bytes):
        raise ValueError(f"row {number}: its image is of type {type(value).__name__}: give bytes, or a path")
    return _Image(key, value, PurePosixPath(name).suffix or ".png", prompt)
