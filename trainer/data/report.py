"""What a reader took, what it left out and why, as one line."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import IO

from ..text import CONTROL, counted

_EXAMPLES = 2


@dataclass
class Report:
    """Numbers of images, captions, rows and prompts that were read from `source`, and what was not.

    `left_out` and `notes` map a reason to the names of the files or lines that it holds for.
    """

    source: str = ""
    taken: Counter[str] = field(default_factory=Counter[str])
    left_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    notes: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def take(self, what: str, number: int = 1) -> None:
        """Count what was read: `images`, `captions`, `rows` or `prompts`."""
        self.taken[what] += number

    def leave_out(self, why: str, name: object) -> None:
        """Record a file or line that was left out."""
        self.left_out.setdefault(why, []).append(str(name))

    def note(self, what: str, name: object) -> None:
        """Record a file or line that was taken in part."""
        self.notes.setdefault(what, []).append(str(name))

    def show(self, file: IO[str] | None = None) -> None:
        """Print the line, on stdout unless another file is given."""
        file = file or sys.stdout
        encoding: str = getattr(file, "encoding", None) or "utf-8"
        print(str(self).encode(encoding, "backslashreplace").decode(encoding), file=file)  # file names may be anything

    def __str__(self) -> str:
        taken = ", ".join(f"{number} {what if number != 1 else what.removesuffix('s')}" for what, number in self.taken.items())
        line = f"read {taken or 'nothing'} from {self.source}; left out: {_listed(self.left_out) or 'nothing'}"
        line += f"; {_listed(self.notes)}" if self.notes else ""
        return CONTROL.sub(" ", line).encode("utf-8", "backslashreplace").decode("utf-8")  # halves of surrogate pairs in names of files


def _listed(reasons: dict[str, list[str]]) -> str:
    return ", ".join(
        f"{counted(len(names), why)} ({', '.join(names[:_EXAMPLES])}{', …' if len(names) > _EXAMPLES else ''})"
        for why, names in reasons.items()
    )
