"""Text files as editors on any system write them: their names, their encoding, their lines, their characters."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)
_SHOWN = 80  # characters of a prompt in a message
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLURALS = ("groups", "images", "pairs", "prompts", "steps")


def counted(number: int, what: str) -> str:
    """`1 pair held out`, `2 pairs held out`: a number and what it is of, whose first word may be one of _PLURALS."""
    word, blank, rest = what.partition(" ")
    return f"{number} {word.removesuffix('s') if number == 1 and word in _PLURALS else word}{blank}{rest}"


def is_file(path: Path) -> bool:
    """Whether a path is a file; False too for a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or UTF-16; line ends stay as they are.

    Raises ValueError with the file and the line for another encoding, or a file that holds no text.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not encoding:
        encoding = _utf_16(data, path) if b"\0" in data else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise ValueError(f"{path} is not {name} (line {line}, byte 0x{data[error.start]:02X}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is not a text file: it holds zero bytes; save it as UTF-8")
    return text


def _utf_16(data: bytes, path: Path) -> str:
    """The byte order of UTF-16 without a mark: of text with many ASCII characters, or with spaces or line ends in one order alone."""
    zeros = {"utf-16-le": data[1::2].count(0), "utf-16-be": data[0::2].count(0)}
    spaced = [name for name in zeros if re.search(r"[ \t\r\n]", data.decode(name, "ignore"))]
    order = max(zeros, key=lambda name: zeros[name])
    if 4 * zeros[order] >= len(data) and len(set(zeros.values())) == 2:
        return order
    if len(spaced) == 1 and not _is_utf_8(data):
        return spaced[0]
    raise ValueError(f"{path} is not a text file: it holds zero bytes; save it as UTF-8")


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def lines(text: str) -> list[str]:
    r"""Lines that end in \n, \r\n or \r; other separators, such as U+2028, are characters of a line. A last line may lack its end."""
    found = re.split(r"\r\n|\n|\r", text)
    return found if found[-1] else found[:-1]


def valid(text: str) -> str:
    """The text with halves of surrogate pairs joined, or replaced by U+FFFD where the other half is missing: no encoder takes one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class CutReport:
    """Warns once that `reader` does not read prompts to their ends."""

    def __init__(self, reader: str) -> None:
        self.reader, self.said = reader, False

    def __call__(self, cut: Mapping[str, int]) -> None:
        """cut: by prompt, the tokens at its end that are not read."""
        longer = {prompt: tokens for prompt, tokens in cut.items() if tokens > 0}
        if not longer or self.said:
            return
        self.said = True
        prompt, tokens = next(iter(longer.items()))
        shown = prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN] + "…"
        others = f"; nor all of {len(longer) - 1} other prompts" if len(longer) > 1 else ""
        log.warning("%s does not read the last %d tokens of %r%s", self.reader, tokens, shown, others)
