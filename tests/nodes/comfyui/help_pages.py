"""Run inside a ComfyUI: the tables of inputs and outputs in the nodes' help pages, from their schemas.

Usage: help_pages.py COMFYUI PACK [write]. Prints the names of pages that differ as one JSON line; with `write` it mends them.
"""

import asyncio
import json
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import nodes as stock

MARK = "## Inputs"
KINDS = {"STRING": "text", "INT": "integer", "FLOAT": "number", "BOOLEAN": "on or off", "COMBO": "choice"}


def plain(text):
    return ("" if text is None else str(text)).replace("|", "\\|").replace("\n", " ").strip()


def kind_of(one):
    return KINDS.get(str(one.io_type), str(one.io_type))


def default_of(one):
    value = getattr(one, "default", None)
    if value is None or getattr(one, "force_input", None) or value == "":
        return "not connected" if getattr(one, "optional", False) and str(one.io_type) not in KINDS else ""
    return f"`{plain(value)}`" if len(str(value)) < 40 else "…"


def tables(described):
    """The schema's inputs and outputs in Markdown."""
    lines = [MARK, "", "| input | type | default | |", "|---|---|---|---|"]
    for one in described.inputs:
        label = getattr(one, "display_name", None) or one.id
        lines.append(f"| **{plain(label)}** | {plain(kind_of(one))} | {default_of(one)} | {plain(one.tooltip)} |")
    if described.outputs:
        lines += ["", "## Outputs", "", "| output | type | |", "|---|---|---|"]
        for one in described.outputs:
            lines.append(f"| **{plain(one.display_name or one.id)}** | {kind_of(one)} | {plain(one.tooltip)} |")
    return "\n".join(lines) + "\n"


asyncio.run(stock.load_custom_node(embedded.pack))
different = []
for name, node in sorted(stock.NODE_CLASS_MAPPINGS.items()):
    if not name.startswith("ImageReFL"):
        continue
    page = Path(embedded.pack) / "web" / "docs" / f"{name}.md"
    text = page.read_text("utf-8")
    wanted = text.partition(MARK)[0].rstrip() + "\n\n" + tables(node.GET_SCHEMA())
    if wanted != text:
        different.append(name)
        if "write" in embedded.arguments:
            page.write_text(wanted, "utf-8")
print(json.dumps(different))
