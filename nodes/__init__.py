"""The ComfyUI side of the pack: the only place that imports ComfyUI."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import comfyui_version
from comfy_api.latest import ComfyExtension, io

_LOG = logging.getLogger(__name__)
# The modules that have nodes, and what of `host.problem` they do
_MODULES = {
    "switch": ("switch models",),
    "combined": ("switch models", "sample"),
    "guider": ("switch models", "sample"),
    "proxy": (),
    "seed_variance": (),
    "detail": ("guide by density",),
    "ranged": ("switch models", "load LoRAs"),
    "lora": ("load LoRAs",),
    "reward_nodes": ("score images",),
    "http_judge": ("score images",),
    "download": (),
    "scoring": ("score images",),
    "folder": (),
    "pairs": ("score images",),
    "pairs_files": (),
    "taste": ("ask for choices",),
    "taste_fit": ("score images", "ask for choices"),
    "training": ("train", "load LoRAs", "score images"),
    "objectives": (),
    "judging": (),
    "sweep": ("switch models", "sample", "score images"),
    "search": ("search by reward", "sample", "score images"),
    "noise": ("train", "score images"),
    "demo": ("build the demo model",),
}


class Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack. Those that this ComfyUI lacks something for are there, and say so when they are queued."""
        found: list[type[io.ComfyNode]] = []
        problems: dict[str, None] = {}  # each once, in their order
        for name, features in _MODULES.items():
            try:
                host, module = (importlib.import_module(f".{part}", __name__) for part in ("host", name))
            except Exception as error:  # a module whose classes derive from what is gone
                problems[_sentence(name, error)] = None
                continue
            said = [sentence for feature in features if (sentence := host.problem(feature))]
            problems |= dict.fromkeys(said)
            for register in ("register_folder", "register_routes"):
                if not said and hasattr(module, register):
                    getattr(module, register)()
            found += [_refusing(node, said[0]) for node in module.NODES] if said else module.NODES
        for sentence in problems:
            _LOG.warning(sentence)
        if not problems and host.is_newer_than_tested():
            _LOG.info(
                "ImageReFL: ComfyUI %s is newer than the tested %s; its self-test passed", comfyui_version.__version__, host.TESTED[-1]
            )
        return found


def _sentence(name: str, error: Exception) -> str:
    return f"ImageReFL cannot load its {name} nodes on ComfyUI {comfyui_version.__version__} ({error}): update ImageReFL"


def _refusing(node: type[io.ComfyNode], sentence: str) -> type[io.ComfyNode]:
    """The node, which says why it does nothing."""

    def execute(cls: type[Any], **_: Any) -> io.NodeOutput:
        raise ValueError(sentence)

    return type(node.__name__, (node,), {"execute": classmethod(execute)})
