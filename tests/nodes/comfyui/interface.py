"""Run inside a ComfyUI: the pack's nodes as saved graphs know them, and which workflows of a folder the server accepts,
and what they give.

Usage: interface.py COMFYUI PACK WORKFLOWS. Prints one JSON line.
"""

import asyncio
import json
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import execution
import folder_paths
import nodes as stock
import old_graphs
from in_process import own_folders
from PIL import Image
from workflows import WIDGETS, api_form

own_folders()
Image.new("RGB", (64, 64), (90, 120, 60)).save("input/example.png")
folder_paths.add_model_folder_path("loras", str(Path(embedded.arguments[0]).parent / "imagerefl"))


HOSTS = {"sampler_name", "scheduler"}  # whose options are ComfyUI's


def described(cls):
    """Inputs by name, `widget` or the socket's type, in their order; widgets' defaults, kinds, ranges and options; types of outputs."""
    inputs, defaults, kinds, ranges, options_ = {}, {}, {}, {}, {}
    for group in ("required", "optional"):
        for name, (kind, *options) in cls.INPUT_TYPES().get(group, {}).items():
            settings = options[0] if options else {}
            widget = (isinstance(kind, list) or kind in WIDGETS) and not settings.get("forceInput")
            inputs[name] = "widget" if widget else kind
            if "default" in settings:
                defaults[name] = settings["default"]
            if widget:
                choices = kind if isinstance(kind, list) else settings.get("options") if kind == "COMBO" else None
                kinds[name] = kind if choices is None else "COMBO"
                if choices is not None and name not in HOSTS:
                    options_[name] = list(choices)
                if "min" in settings:
                    ranges[name] = [settings["min"], settings["max"]]
    flags = [bool(getattr(cls, "INPUT_IS_LIST", False)), list(cls.OUTPUT_IS_LIST), bool(getattr(cls, "OUTPUT_NODE", False))]
    widgets = {"kinds": kinds, "ranges": ranges, "options": options_}
    return {"inputs": inputs, "defaults": defaults, "outputs": list(cls.RETURN_TYPES), "flags": flags, **widgets}


async def main():
    await stock.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    theirs = set(stock.NODE_CLASS_MAPPINGS)
    await stock.load_custom_node(embedded.pack)
    ours = {name: described(cls) for name, cls in stock.NODE_CLASS_MAPPINGS.items() if name not in theirs}
    known = {name: {"input": cls.INPUT_TYPES()} for name, cls in stock.NODE_CLASS_MAPPINGS.items()}
    errors, prompts = {}, {}
    for path in sorted(Path(embedded.arguments[0]).glob("*.json")):
        text = path.read_text("utf-8")
        if "SaveLoRANode" not in known:  # ComfyUI's own, which later versions call SaveLoRA
            text = text.replace('"SaveLoRANode"', '"SaveLoRA"')
        prompts[path.stem] = api_form(json.loads(text), known)
        validity = await execution.validate_prompt(path.stem, prompts[path.stem], None)
        kinds = {error["type"] for node in validity[3].values() for error in node["errors"]}
        errors[path.stem] = sorted(kinds)
    names = getattr(embedded.ours("nodes.training"), "_OLD", None)  # none in 0.1.0
    return {"nodes": ours, "errors": errors, **await old_graphs.run(prompts, names)}


print(json.dumps(asyncio.run(main())))
