"""One self-contained HTML page: what training bought and what it cost, in pictures and figures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import images as pictures
from .evaluate import Judged, frontier_point

_NAMES = {"base": "base", "base_unguided": "base, unguided", "refl": "ReFL", "imagerefl": "ImageReFL"}
_COLOURS = {"refl": "#c4532d", "imagerefl": "#1f6f8b", "base": "#444444", "base_unguided": "#999999"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ImageReFL: reward and diversity</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
 td:first-child, th:first-child { text-align: left } tr.headline { background: #f2f7f9; font-weight: 600 }
 img { max-width: 100%; height: auto } .grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem }
 figure { margin: 0 } figcaption { font-size: .9rem; color: #555 } .grids img { image-rendering: pixelated; width: 100% }
 .note { background: #fff6e0; padding: .6rem 1rem; border-left: 4px solid #e0a800 } details { margin-top: 2rem } pre { overflow-x: auto; background: #f6f6f6; padding: 1rem }
 .rows { columns: 2; font-size: .9rem; color: #555 }
</style></head><body>
<h1>Reward up, diversity kept?</h1>
{% if quick %}<p class="note">This was the quick demo. It proves that everything runs; its models are too short-trained and its samples too few to prove the method.</p>{% endif %}
<p>{{ summary }}</p>
<h2>The reward–diversity frontier</h2>
<p>Each point is one switch k: the base model draws the first k of {{ steps }} steps, the tuned model the rest. Right is more diverse than left, up is better liked
by a preference model that training never saw. The dotted lines are the base model.</p>
<img alt="held-out reward against diversity for every switch k" src="data:image/png;base64,{{ frontier }}">
<p>Area that each frontier dominates (held-out reward): {% for name, area, low, high in areas %}{{ name }} {{ "%.3f"|format(area) }} [{{ "%.3f"|format(low) }}, {{ "%.3f"|format(high) }}]{% if not loop.last %}, {% endif %}{% endfor %};
lead of ImageReFL over ReFL {{ "%.3f"|format(lead[0]) }} to {{ "%.3f"|format(lead[1]) }} (95 % bootstrap over prompts).</p>
<h2>Same prompts, same seeds</h2>
<p class="rows">{% for prompt in shown %}row {{ loop.index }}: “{{ prompt }}”<br>{% endfor %}</p>
<div class="grids">{% for name, picture in grids %}<figure><img alt="{{ name }}: one prompt per row, one seed per column" src="data:image/png;base64,{{ picture }}"><figcaption>{{ name }}</figcaption></figure>{% endfor %}</div>
<h2>Figures</h2>
<table><tr><th>model</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in table %}<tr{% if row.headline %} class="headline"{% endif %}><td>{{ row.name }}</td>{% for v in row["values"] %}<td>{{ "%.3f"|format(v) }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>reward: the preference model that training sees; heldout: another architecture, trained on other choices; both in standard deviations of the base model's images.
gold: the simulated rater's own utility, never trained on. diversity: 1 − mean cosine within a prompt; FID and LogCov against real renders (lower is closer).</p>
<h2>Over training</h2>
<img alt="rewards and diversity over training" src="data:image/png;base64,{{ curves }}">
<details><summary>Settings</summary><pre>{{ settings }}</pre></details>
</body></html>
"""


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _figure_png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def frontier_figure(base: Judged, by_method: Mapping[str, Sequence[Judged]], switches: Sequence[int], axes: Sequence[str]) -> Any:
    """Reward against diversity, one panel per reward, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(axes), 3.8))
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes):
        for method, points in by_method.items():
            at = [frontier_point(p, base, axis) for p in points]
            panel.plot([x for x, _ in at], [y for _, y in at], "o-", color=_COLOURS[method], label=_NAMES[method])
            for (x, y), k in zip(at, switches):
                panel.annotate(f"k={k}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=_COLOURS[method])
        panel.axhline(0, color="#888888", linestyle=":", linewidth=1)
        panel.axvline(1, color="#888888", linestyle=":", linewidth=1)
        panel.plot([1], [0], "s", color=_COLOURS["base"], label="base")
        panel.set_xlabel("diversity / base diversity")
        panel.set_ylabel(f"{'proxy' if axis == 'reward' else axis} gain (base s.d.)")
        panel.legend(fontsize=8)
    figure.tight_layout()
    return figure


def curves_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Proxy, held-out, gold and diversity over training, one panel per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.4))
    for panel, (method, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        steps = [p["step"] for p in points]
        for name, label in (("reward", "proxy"), ("heldout", "held-out"), ("gold", "gold"), ("diversity", "diversity")):
            values = [p[name] for p in points]
            panel.plot(steps, [v / values[0] if name == "diversity" else v - values[0] for v in values], label=label)
        panel.set_title(f"{_NAMES[method]}, k = 0")
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("change; diversity as a ratio")
        panel.legend(fontsize=8)
    figure.tight_layout()
    return figure


def write_report(
    path: Path,
    results: Mapping[str, Any],
    drawn: Mapping[str, Tensor],
    prompts: Sequence[str],
    per_prompt: int,
    headline: int,
    base: Judged,
    by_method: Mapping[str, Sequence[Judged]],
    switches: Sequence[int],
) -> None:
    """Write the demo's page. `drawn` holds images (N,3,H,W) by label, `prompts` the prompt of each, grouped."""
    from jinja2 import Environment

    rows = 4
    shown = list(dict.fromkeys(prompts))[:rows]
    order = ["base", "base_unguided", "refl k=0", f"refl k={headline}", "imagerefl k=0", f"imagerefl k={headline}"]
    grids = []
    for label in order:
        sheet = pictures.to_pil(pictures.grid(drawn[label][: rows * per_prompt], per_prompt))
        sheet = sheet.resize((sheet.width * 2, sheet.height * 2), 0)
        name, _, k = label.partition(" ")
        grids.append((f"{_NAMES[name]}{', ' + k if k else ''}", _png(sheet)))
    columns = ["reward", "heldout", "gold", "diversity", "fid", "logcov"]
    table = [{"name": _NAMES[n], "headline": False, "values": [results[n][c] for c in columns]} for n in ("base", "base_unguided")]
    for point in results["points"]:
        name = f"{_NAMES[point['model']]}, k={point['k']}"
        table.append({"name": name, "headline": point["k"] == headline, "values": [point[c] for c in columns]})
    environment = Environment(autoescape=True)
    page = environment.from_string(_PAGE).render(
        quick=results["config"]["quick"],
        summary=summary(results, headline),
        steps=20,
        frontier=_figure_png(frontier_figure(base, by_method, switches, ["heldout", "reward", "gold"])),
        areas=[(_NAMES[m], results["frontier"][m]["heldout"], *results["ci"]["frontier"][m]) for m in by_method],
        lead=results["ci"]["frontier_lead"],
        shown=[html.unescape(s) for s in shown],
        grids=grids,
        columns=columns,
        table=table,
        curves=_figure_png(curves_figure(results["curves"])),
        settings=json.dumps(results["config"], indent=1),
    )
    path.write_text(page, "utf-8")


def summary(results: Mapping[str, Any], headline: int) -> str:
    """What happened, in sentences that follow the figures wherever they fall."""
    base = results["base"]
    points = {(p["model"], p["k"]): p for p in results["points"]}

    def change(point: Mapping[str, float]) -> str:
        kept = 100 * point["diversity"] / base["diversity"]
        return f"held-out reward {point['heldout'] - base['heldout']:+.2f}, {kept:.0f} % of the base model's diversity"

    parts = [f"{_NAMES[m]} alone: {change(points[m, 0])}; combined at k={headline}: {change(points[m, headline])}." for m in ("refl", "imagerefl")]
    return " ".join(parts)
