"""What became of the pairs: counts by reason, margins, and how far the rewards agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.images import ImageSource
from ..text import counted
from .label import WITHOUT, Pair, significant


def report(
    candidates: Sequence[Pair],
    kept: Mapping[str, Sequence[Pair]],
    dropped: Mapping[str, int],
    rewards: Sequence[str],
    heldout: str,
    given: Sequence[tuple[ImageSource, ImageSource, str]] | None = None,
    share: float = 0.0,
) -> dict[str, Any]:
    """Of all candidates and of the kept ones of each table, as plain values.

    given: the pairs as they were labelled before, better image, worse image and prompt; `turned` counts those of the other label.
    share: of the pairs that was to be held out.
    `agreement` has of every two rewards the share of candidates that they order alike, of those that both order.
    """
    together = [pair for part in kept.values() for pair in part]
    found: dict[str, Any] = {
        "candidates": len(candidates) + sum(n for why, n in dropped.items() if why in WITHOUT.values()),
        "kept": {name: len(part) for name, part in kept.items()},
        "prompts": {name: len({pair.prompt for pair in part}) for name, part in kept.items()},
        "dropped": dict(sorted(dropped.items())),
        "margins": {"candidates": _quantiles(candidates), "kept": _quantiles(together)},
        "agreement": {f"{a} and {b}": _alike(candidates, i, j) for i, a in enumerate(rewards) for j, b in enumerate(rewards) if i < j},
    }
    if given is not None:
        before = set(given)  # which may have a pair both ways
        turned = {name: [(p.chosen, p.rejected, p.prompt) not in before for p in part] for name, part in kept.items()}
        found["turned"] = {name: sum(each) for name, each in turned.items()}
    if share:
        asked = max(1, round(share * len(together)))
        found["split"] = {"share": share, "asked": asked, "held_out": len(kept.get("pairs-heldout", ()))}
    if heldout:
        found["heldout"] = {"reward": heldout, "candidates": _prefers(candidates), "kept": _prefers(together)}
    return found


def lines(found: Mapping[str, Any], unit: str) -> list[str]:
    """A report in sentences. unit: of the margins."""
    kept, dropped = found["kept"], found["dropped"]
    names = {"pairs": "for training", "pairs-heldout": "held out"}
    parts = [f"{number} {names.get(name, name)} ({counted(found['prompts'][name], 'prompts')})" for name, number in kept.items()]
    said = [f"kept {sum(kept.values())} of {counted(found['candidates'], 'pairs')}: {', '.join(parts)}"]
    split = found.get("split", {"asked": 0, "held_out": 0})
    if split["asked"] != split["held_out"]:
        said.append(
            f"held out {split['held_out']} where {split['share']:g} of the pairs is {split['asked']}: pairs that share a prompt or "
            "near-copies of an image stay together"
        )
    if dropped:
        said.append(f"dropped: {', '.join(counted(number, why) for why, number in dropped.items())}")
    if "turned" in found:
        said.append(f"labels turned round by the rewards: {sum(found['turned'].values())} of {counted(sum(kept.values()), 'pairs')}")
    for of, quantiles in found["margins"].items():
        if quantiles:
            low, middle, high = (f"{quantiles[key]:.3g}" for key in ("10%", "50%", "90%"))
            said.append(f"margin of {of}: median {middle}, middle four fifths {low} to {high} ({unit})")
    said += [f"{names} order {share:.0%} of the candidates alike" for names, share in found["agreement"].items() if share is not None]
    if "heldout" in found:
        shares = [f"{found['heldout'][of]:.0%} of the {of}" for of in ("candidates", "kept") if found["heldout"][of] is not None]
        said.append(f"held-out {found['heldout']['reward']} prefers the better image in {' and '.join(shares) or 'no pair: all are equal'}")
    return said


def _quantiles(pairs: Sequence[Pair]) -> dict[str, float]:
    margins = torch.tensor([pair.margin for pair in pairs if pair.margin is not None], dtype=torch.float64)
    if not len(margins):
        return {}
    ordered = margins.sort().values
    return {f"{share}%": significant(float(ordered[round(share / 100 * (len(ordered) - 1))])) for share in (0, 10, 50, 90, 100)}


def _alike(pairs: Sequence[Pair], i: int, j: int) -> float | None:
    both = [pair.gaps[i] * pair.gaps[j] for pair in pairs if pair.gaps and pair.gaps[i] * pair.gaps[j] != 0]
    return round(sum(product > 0 for product in both) / len(both), 6) if both else None


def _prefers(pairs: Sequence[Pair]) -> float | None:
    gaps = [pair.heldout for pair in pairs if pair.heldout]
    return round(sum(gap > 0 for gap in gaps) / len(gaps), 6) if gaps else None
