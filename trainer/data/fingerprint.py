"""What tells the data of one run from those of another: hashes of their content in its order, not of their paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

Fingerprint = dict[str, int | str]
"""`number` of samples, and a SHA-256 of each kind of content, such as `images` and `captions`."""


def fingerprint(number: int, **content: Iterable[str]) -> Fingerprint:
    """A fingerprint of the texts (or hashes) of each kind, in their order."""
    return {"number": number, **{kind: _hash(texts) for kind, texts in content.items()}}


def difference(then: Fingerprint, now: Fingerprint) -> str:
    """What has changed, as in `3 images, now 4`; "" where nothing has."""
    kinds = [kind for kind in now if kind != "number"]
    if then.get("number") != now["number"]:
        return f"{then.get('number')} {kinds[0]}, now {now['number']}"
    changed = [kind for kind in kinds if then.get(kind) != now[kind]]
    return f"other {' and '.join(changed)}" if changed else ""


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
