"""Where a value that is not finite enters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_finite(values: Tensor, prompts: Sequence[str], what: str) -> Tensor:
    """The values; ValueError that names what gave NaN or infinity, and for which prompt, so that nothing ranks or averages it."""
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        where = f" for {prompts[row]!r}" if len(values) == len(prompts) else ""
        raise ValueError(f"{what} that are not finite{where}")
    return values
