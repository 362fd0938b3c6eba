"""Text chunks of PNG files, changed without decoding the pixels (PNG specification, sections 5.3 and 11.3.3)."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PIXELS = (b"IDAT", b"fcTL")  # of a still image; of an animation's first frame
_LONGEST = 1 << 24  # of an unpacked text, in bytes


def update_text(path: Path, key: str, change: Callable[[str | None], str]) -> None:
    """Replace the text of a key by `change` of it, in ASCII; the old text is None where there is none.

    All other bytes stay and keep their order: chunks, pixels, frames, and what stands behind the image. The new text stands before the
    pixels, where readers look. The file keeps its mode and times, its owner where permitted. It is replaced by a rename, so a kill leaves
    the old file or the new; a symbolic link stays and its target is changed, a hard link of another name keeps the old content.
    Raises ValueError for other formats, damaged files and what `change` refuses, OSError where the file cannot be written.
    """
    path = path.resolve()
    content = path.read_bytes()
    if not content.startswith(_SIGNATURE):
        raise ValueError(f"{path} is not a PNG: scores can be written into PNG files only")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write into {path}: it is read-only")
    kept: list[tuple[bytes, bytes]] = []
    old: str | None = None
    for kind, body, whole in _chunks(content, path):
        if kind in _TEXTS and body.partition(b"\0")[0] == key.encode("latin-1"):
            old = _text(kind, body, path)
        else:
            kept.append((kind, whole))
    before = next((i for i, (kind, _) in enumerate(kept) if kind in _PIXELS), None)
    if before is None:
        raise ValueError(f"{path} is a PNG without pixels: it was not changed")
    chunk = _chunk(b"tEXt", key.encode("latin-1") + b"\0" + change(old).encode("ascii"))
    kept.insert(before, (b"tEXt", chunk))
    _replace(path, b"".join([_SIGNATURE, *(whole for _, whole in kept)]))


def _replace(path: Path, content: bytes) -> None:
    """Write a file anew under a name that nobody has, with the attributes of the old one, then rename it."""
    partial: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(".partial", ".", path.parent)
        partial = Path(name)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        owner = path.stat()
        if hasattr(os, "chown") and (owner.st_uid, owner.st_gid) != (os.getuid(), os.getgid()):
            with suppress(PermissionError):  # then it is ours
                os.chown(partial, owner.st_uid, owner.st_gid)
        shutil.copystat(path, partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write into {path}: {error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(content: bytes, path: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Type, data and all bytes of every chunk; of the last one, with the bytes behind the image."""
    at, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise ValueError(f"{path} is a PNG cut short: it was not changed")
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + length
        if end > len(content):
            raise ValueError(f"{path} is a PNG cut short: it was not changed")
        yield kind, content[at + 8 : end - 4], content[at:end] if kind != b"IEND" else content[at:]
        at = end


def _text(kind: bytes, body: bytes, path: Path) -> str:
    """The text of a chunk, which another program may have compressed or marked as UTF-8."""
    text = body.partition(b"\0")[2]
    try:
        compressed = text[:1] == b"\1" if kind == b"iTXt" else kind == b"zTXt"
        if kind == b"iTXt":  # two flags, language, key in that language
            text = text[2:].split(b"\0", 2)[2]
        elif compressed:
            text = text[1:]
        if compressed:
            text = zlib.decompressobj().decompress(text, _LONGEST)
        return text.decode("utf-8" if kind == b"iTXt" else "latin-1")
    except (zlib.error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{path} has earlier scores that cannot be read: it was not changed") from error
