"""Run inside a ComfyUI: the pack on one that lacks what some nodes need, and on one newer than the tested ones.

Usage: missing.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import json
import logging
import pkgutil

import embedded  # first: it puts ComfyUI on the path
import comfyui_version

host = embedded.ours("nodes.host")


class Kept(logging.Handler):
    """What is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


def load():
    """The pack's nodes by id, as ComfyUI loads them, and the lines that it logs."""
    kept = Kept()
    logging.getLogger().addHandler(kept)
    logging.getLogger().setLevel(logging.INFO)
    extension = asyncio.run(embedded.module.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    logging.getLogger().removeHandler(kept)
    return {node.GET_SCHEMA().node_id: node for node in nodes}, [line for line in kept.lines if "ImageReFL" in line[1]]


def without(name, call):
    """What `call` gives while ComfyUI lacks `module:name`."""
    owner, _, last = name.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner)
    kept = vars(owner)[last]
    delattr(owner, last)
    try:
        return call()
    finally:
        setattr(owner, last, kept)


def refusals(nodes):
    """What nodes say that cannot work, by id."""
    said = {}
    for name, node in nodes.items():
        if node.execute.__func__.__module__ == embedded.module.__name__ + ".nodes":
            try:
                node.execute()
            except ValueError as problem:
                said[name] = str(problem)
    return said


whole, logged = load()
results = {"as it is": logged, "each symbol": {}}
for feature, entries in host.NEEDED.items():
    for entry in entries:
        name = entry.split()[0]
        results["each symbol"][f"{feature}: {name}"] = without(name, lambda f=feature: host.problem(f))
results["all there"] = [host.problem(feature) for feature in host.NEEDED]

nodes, logged = without("comfy.samplers:encode_model_conds", load)
results["no training"] = {"logged": logged, "refused": refusals(nodes), "absent": sorted(whole.keys() ^ nodes.keys())}
nodes, logged = without("comfy.lora:calculate_weight", load)
results["no switch"] = {"logged": logged, "refused": refusals(nodes), "absent": sorted(whole.keys() ^ nodes.keys())}

given = embedded.ours("nodes.demo").comfy.sd.CLIP.__init__
embedded.ours("nodes.demo").comfy.sd.CLIP.__init__ = lambda self, target: None
results["another signature"] = host.problem("build the demo model")
embedded.ours("nodes.demo").comfy.sd.CLIP.__init__ = given

comfyui_version.__version__ = "99.1.2"
results["newer"] = load()[1]
results["newer and lacking"] = without("comfy.samplers:encode_model_conds", load)[1]
print(json.dumps(results))
