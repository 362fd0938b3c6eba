"""The verdict on the claim from the records of finished training seeds: python -m tools.embedded.verdict SEED.json... [--controls FILE]

Every figure is a gain over the guided base, on the same prompts and noise. Intervals are of a paired bootstrap over prompts, in which
the base and every curve are interpolated anew for each resample.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.demo.verdict import CO_PRIMARY, FILE, decide
from trainer.metrics.frontier import SHARE, Curves
from trainer.runtime.files import write_text

from .claim import ARMS, CHECKPOINTS, EQUAL_CALLS, STRENGTHS, UPDATES

AXES = {"heldout": "held-out", "gold": "gold", "reward": "proxy"}

Record = Mapping[str, Any]


def last(arm: str) -> str:
    """The name of an arm's last checkpoint at equal updates."""
    return f"{arm} {UPDATES}"


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """What the demo's page says of the experiment."""
    curves = [Curves(record["points"]) for record in records]
    leads = {axis: [c.lead([last("imagerefl")], [last("refl")], axis) for c in curves] for axis in AXES}
    beside = {axis: [c.lead([last("imagerefl")], [last("refl+diffusion")], axis) for c in curves] for axis in CO_PRIMARY}
    tie = bool(records) and not any(all(low > 0 for _, low, _ in beside[axis]) for axis in CO_PRIMARY)
    return {"verdict": decide(leads), "seeds": len(records), "tie": tie, "leads": leads, "over refl+diffusion": beside}


def tables(records: Sequence[Record], controls: Record | None) -> str:
    """The verdict and every table, in Markdown."""
    curves, found = [Curves(record["points"]) for record in records], summary(records)
    leads, beside = found["leads"], found["over refl+diffusion"]
    out = [f"**Verdict: {found['verdict']}.**" + (" ReFL with the same diffusion loss does as well as ImageReFL." if found["tie"] else "")]
    out += ["", f"Leads of ImageReFL + combined at {SHARE:.0%} of the guided base's diversity, training seeds in turn:", ""]
    out += _header("lead over", "axis", *(f"seed {record['seed']}" for record in records))
    out += [_row("ReFL", AXES[axis], *map(_interval, found)) for axis, found in leads.items()]
    out += [_row("ReFL + diffusion loss", AXES[axis], *map(_interval, found)) for axis, found in beside.items()]
    hulls = {arm: [f"{arm} {step}" for step in CHECKPOINTS] for arm in ARMS}
    for axis in AXES:
        out.append(_row("ReFL, at 90 %", AXES[axis], *(_interval(c.lead([last("imagerefl")], [last("refl")], axis, 0.9)) for c in curves)))
    for axis in AXES:
        out.append(
            _row("ReFL, best checkpoint of each", AXES[axis], *(_interval(c.lead(hulls["imagerefl"], hulls["refl"], axis)) for c in curves))
        )
    weaker = [last("refl"), *(f"{last('refl')} at {100 * s:.0f} %" for s in STRENGTHS)]
    for axis in CO_PRIMARY:
        out.append(_row("ReFL, best strength", AXES[axis], *(_interval(c.lead([last("imagerefl")], weaker, axis)) for c in curves)))
    longer = f"imagerefl {EQUAL_CALLS}"
    for axis in CO_PRIMARY:
        out.append(_row("ReFL, equal denoiser calls", AXES[axis], *(_interval(c.lead([longer], [last("refl")], axis)) for c in curves)))
    out += ["", "At ReFL's proxy gain with k = 12, ImageReFL has more of:", "", *_header("", *(f"seed {r['seed']}" for r in records))]
    equal = [c.at_equal_proxy(last("imagerefl"), last("refl"), 12) for c in curves]
    out += [_row(axis, *(f"{e[axis]:+.2f}" if axis in e else "–" for e in equal)) for axis in ("heldout", "gold", "diversity")]
    out += ["", "Every point, seeds in turn:", "", *points_table(records)]
    if controls is not None:
        out += ["", f"Controls, training seed {controls['seed']}:", "", *control_table(controls, records)]
    return "\n".join(out) + "\n"


def points_table(records: Sequence[Record]) -> list[str]:
    """Gains, shares of diversity, match and distances of every point."""
    out = _header("model", "k", *AXES.values(), "diversity of base", "of all attributes", "match", "FID", "LogCov")
    curves = [Curves(record["points"]) for record in records]
    for point in records[0]["points"]:
        model, k = point.split("|")
        every = torch.arange(curves[0].prompts)
        cells = [" / ".join(f"{c.means(point, axis, every):+.2f}" for c in curves) for axis in AXES]
        shares = [" / ".join(f"{c.means(point, axis, every):.0%}" for c in curves) for axis in ("diversity", "reader_diversity")]
        match = " / ".join(f"{float(c.values[point]['match'].mean()):.0%}" for c in curves)
        rows = [record["points"][point] for record in records]
        out.append(_row(model, k, *cells, *shares, match, *(" / ".join(f"{r[name]:.1f}" for r in rows) for name in ("fid", "logcov"))))
    return out


def control_table(controls: Record, records: Sequence[Record]) -> list[str]:
    """Leads of the controls: the old weight over ReFL of the same seed, and the two arms that trained on the rater."""
    mine = next((record for record in records if record["seed"] == controls["seed"]), None)
    out = _header("lead", *(AXES[axis] for axis in CO_PRIMARY))
    if mine is not None:
        both = Curves({**mine["points"], **controls["points"]})
        out.append(
            _row("weight 0.05 over ReFL", *(_interval(both.lead([last("imagerefl, old weight")], [last("refl")], a)) for a in CO_PRIMARY))
        )
    own, pair = Curves(controls["points"]), ([last("imagerefl on the rater")], [last("refl on the rater")])
    return [*out, _row("the rater as reward, ImageReFL over ReFL", *(_interval(own.lead(*pair, axis)) for axis in CO_PRIMARY))]


def _interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def read(paths: Sequence[Path]) -> list[Record]:
    """Records; ValueError where two were made with different weights."""
    records = [json.loads(path.read_text("utf-8")) for path in paths]
    for path, record in zip(paths, records):
        for name, value in records[0]["weights"].items():
            if record["weights"].get(name) != value:
                raise ValueError(
                    f"{path} was made with another {name}: {str(record['weights'].get(name))[:12]}, {paths[0]} with {value[:12]}"
                )
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The verdict of docs/results.md: prints its tables, and writes trainer/demo/verdict.json")
    parser.add_argument("records", nargs="*", type=Path, help="a record per training seed; none: undecided (n = 0)")
    parser.add_argument("--controls", type=Path)
    a = parser.parse_args()
    seeds, controls = read(a.records), a.controls and json.loads(a.controls.read_text("utf-8"))
    write_text(json.dumps(summary(seeds), indent=1) + "\n", FILE)
    sys.stdout.write(tables(seeds, controls) if seeds else f"**Verdict: {summary(seeds)['verdict']}.**\n")
