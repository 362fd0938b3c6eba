"""Text chunks of PNG files, changed without decoding the pixels (PNG specification, sections 5.3 and 11.3.3)."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_text(path: Path, key: str, text: str) -> None:
    """Store one ASCII text under a key, replacing the key's old one; every other chunk stays byte for byte.

    The file is replaced by a rename, so a kill leaves the old one or the new. A link stays, and its target is changed.
    Raises ValueError for other formats and damaged files, OSError where the file cannot be written.
    """
    path = path.resolve()
    content = path.read_bytes()
    if not content.startswith(_SIGNATURE):
        raise ValueError(f"{path} is not a PNG: scores can be written into PNG files only")
    prefix = key.encode("latin-1") + b"\0"
    kept = [(kind, whole) for kind, body, whole in _chunks(content, path) if not (kind == b"tEXt" and body.startswith(prefix))]
    before = next((i for i, (kind, _) in enumerate(kept) if kind == b"IDAT"), None)  # readers may stop at the pixels
    if before is None:
        raise ValueError(f"{path} is a PNG without pixels: it was not changed")
    kept.insert(before, (b"tEXt", _chunk(b"tEXt", prefix + text.encode("ascii"))))
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(b"".join([_SIGNATURE, *(whole for _, whole in kept)]))
        shutil.copymode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write into {path}: {error}") from error


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(content: bytes, path: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Type, data and all bytes of every chunk."""
    at, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise ValueError(f"{path} is a PNG cut short: it was not changed")
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + length
        if end > len(content):
            raise ValueError(f"{path} is a PNG cut short: it was not changed")
        yield kind, content[at + 8 : end - 4], content[at:end]
        at = end
