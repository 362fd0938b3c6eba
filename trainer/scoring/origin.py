"""How the images that reach a node of a ComfyUI graph were made: prompt, seed and model, where the graph tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .graph import UnclearPrompt, first_samplers, graph_prompt
from .graph_nodes import Node, read_nodes

T = TypeVar("T")
_SEEDS = ("seed", "noise_seed")
_NUMBERS = (*_SEEDS, "value", "int", "number")  # of nodes that give out a number
_TO_MODEL = re.compile(r"\w*model\w*|\w*guider\w*|base\w*|tuned\w*|\w*pipe|\w*unet")
_MODEL_NAMES = re.compile(r"(ckpt|unet|model|diffusion_model|gguf|lora)_name(_?\d+)?")
_FILE = re.compile(r".+\.(safetensors|ckpt|pt|pth|gguf|sft|bin)", re.IGNORECASE)
_NO_FILES = {"", "none"}


@dataclass(frozen=True)
class Origin:
    """What is known; `unclear` says why the prompt is missing. model: names of files, such as `sd15.safetensors + style.safetensors`."""

    prompt: str | None
    seed: int | None
    model: str | None
    unclear: str = ""


def origin(graph: Mapping[str, Any], node: str) -> Origin:
    """How the images that reach `node` were made, from the API graph; what several samplers say differently is not known."""
    nodes = read_nodes(graph)
    ancestors = _above(nodes, [node], lambda _: True)
    part = {name: graph[name] for name in graph if name in ancestors}
    try:
        prompt, unclear = graph_prompt(part), ""
    except UnclearPrompt as error:
        prompt, unclear = None, str(error)
    try:
        samplers = [nodes[name] for name in sorted(first_samplers(part, node)) if name in nodes]
    except UnclearPrompt:
        samplers = []
    return Origin(prompt, _only(_seed(nodes, one) for one in samplers), _only(_model(nodes, one) for one in samplers), unclear)


def _above(nodes: Mapping[str, Node], start: Collection[str], takes: Callable[[str], bool]) -> dict[str, None]:
    """The nodes `start` and those before them along links whose inputs' names `takes` accepts, the nearest first."""
    found = dict.fromkeys(name for name in start if name in nodes)
    waiting = list(found)
    while waiting:
        for name, (source, _) in nodes[waiting.pop(0)].links.items():
            if source in nodes and source not in found and takes(name.lower()):
                found[source] = None
                waiting.append(source)
    return found


def _only(values: Iterable[T | None]) -> T | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _seed(nodes: Mapping[str, Node], sampler: Node) -> int | None:
    """The sampler's own seed, or that of the noise or number node linked to it."""
    node, names = sampler, _SEEDS
    for _ in range(len(nodes)):
        given = next((name for name in names if name in node.inputs), None)
        if given is not None and given not in node.links:
            value = node.inputs[given]
            return value if isinstance(value, int) and not isinstance(value, bool) else None
        link = node.links.get(given or "noise") or (next(iter(node.links.values())) if len(node.links) == 1 else None)
        if link is None or link[0] not in nodes:
            return None
        node, names = nodes[link[0]], _NUMBERS
    return None


def _model(nodes: Mapping[str, Node], sampler: Node) -> str | None:
    """The names of the model files before a sampler, checkpoints first and LoRAs in the order in which they are applied."""
    files: list[str] = []
    loras: list[str] = []
    for name in reversed(_above(nodes, [sampler.id], lambda link: bool(_TO_MODEL.fullmatch(link)))):
        for key, value in nodes[name].inputs.items():
            if isinstance(value, str) and _MODEL_NAMES.fullmatch(key) and value.lower() not in _NO_FILES and _FILE.fullmatch(value):
                (loras if "lora" in key else files).append(value)
    return " + ".join(dict.fromkeys([*files, *loras])) or None
