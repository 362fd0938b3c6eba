"""The prompt of an image from ComfyUI's API graph: from the node that saved it, through its first sampler, to the text."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from .graph_nodes import DELIMITERS, TOKENS_OF, Link, Node, chosen, joined, joins, read_nodes, rewritten, text_inputs, why_unknown

_STRONG = 0.6  # of denoising: above it a later sampler's prompt shows as much as the first one's
_NOT_IMAGES = re.compile(
    r"(model|clip|vae|positive|negative|guider|mask|noise|sampler|sigmas|seed|control_?net|text|prompt|string|style)s?(_\w*)?|cond\w*|\w+_(model|mask)"
)
_SAVES = re.compile(r"save.*image|image.*save|preview.*image|save.*(webp|png)|video.?combine", re.IGNORECASE)
_SAMPLES = re.compile(r"sampler|detailer|ultimate.?sd", re.IGNORECASE)
_SETTINGS = frozenset(("steps", "sigmas", "seed", "noise_seed", "denoise", "cfg", "sampler_name"))
_CONDITIONING = tuple(  # inputs, the strongest first
    map(re.compile, (r"positive(_\d+)?", r"(base_)?cond\w*", r"guider", r"(text|positive)_embeds", r"\w*(pipe|ctx|context)(_\d+)?"))
)
_PAIRS = re.compile(r"control.?net|inpaint|conditioning|tovideo|pix2pix|guide\b", re.IGNORECASE)  # outputs: positive, negative

Request = tuple[str, str, int]  # what: samplers, condition or text; node; output slot
Steps = Generator[Request, Any, Any]


class UnclearPrompt(ValueError):
    """Why metadata give no prompt for certain."""


def only_one(texts: Iterable[str], where: str) -> str:
    """The one text that is not blank, or ""; spaces and line ends do not count. Raises UnclearPrompt where there are several."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(" ".join(text.split()), text.strip())
    found.pop("", None)
    if len(found) > 1:
        first, second = list(found)[:2]
        raise UnclearPrompt(f"{where} {len(found)} different prompts, such as {first[:40]!r} and {second[:40]!r}")
    return next(iter(found.values()), "")


def graph_prompt(graph: Mapping[str, Any], file_name: str = "") -> str:
    """The positive prompt of the first sampler of the chain that made the image.

    The first sampler decides the layout. Refiners, second passes and detailers after it do not count, unless a second pass denoises
    by more than 60 %. Of several saved images the one whose prefix begins `file_name` is taken. Raises UnclearPrompt with the reason
    where several different prompts are possible, the prompt is empty, or the text is not in the graph.
    """
    return _Graph(graph).prompt(file_name)


def first_samplers(graph: Mapping[str, Any], node: str) -> frozenset[str]:
    """The ids of the samplers that decided the layout of the images that reach a node."""
    return _Graph(graph).solve(("samplers", node, 0))


class _Graph:
    """Results are computed once per node, on a stack of its own: graphs may be thousands of nodes deep."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self.nodes = read_nodes(graph)
        self.done: dict[Request, Any] = {}

    def prompt(self, file_name: str) -> str:
        """See `graph_prompt`."""
        by_end = self._by_end(file_name)
        samplers = sorted(set[str]().union(*by_end.values()))
        if not samplers:
            raise UnclearPrompt("no sampler with a prompt made the image")
        found = only_one([self.solve(("condition", name, -1)) for name in samplers], "the graph made images of")
        if not found:
            raise UnclearPrompt("the prompt is empty")
        return found

    def _by_end(self, file_name: str) -> Mapping[str, frozenset[str]]:
        """The samplers of the nodes that may have written this file: of its prefix, else all that save, show, or end the graph."""
        linked = {source for node in self.nodes.values() for source, _ in node.links.values()}
        ends = [node for node in self.nodes.values() if node.id not in linked or _SAVES.search(node.kind)]
        showing = [end for end in ends if _SAVES.search(end.kind)]
        saving = [end for end in showing if "preview" not in end.kind.lower()]
        named = [end for end in showing if _wrote(end.inputs.get("filename_prefix"), file_name)]
        return {end.id: self.solve(("samplers", end.id, 0)) for end in named or saving or showing or ends}

    def solve(self, request: Request) -> Any:
        """The result of one request; raises UnclearPrompt."""
        stack: list[tuple[Request, Steps]] = [(request, self._steps(request))]
        running, reply = {request}, None
        while stack:
            asked, steps = stack[-1]
            try:
                need = steps.throw(reply) if isinstance(reply, UnclearPrompt) else steps.send(reply)
            except StopIteration as end:
                result: Any = end.value
            except UnclearPrompt as error:
                result = error.with_traceback(None)
            else:
                if need in running:
                    reply = UnclearPrompt(f"the links of node {need[1]} run in a circle")
                elif need in self.done:
                    reply = self.done[need]
                else:
                    running.add(need)
                    stack.append((need, self._steps(need)))
                    reply = None
                continue
            self.done[asked] = reply = result
            running.discard(asked)
            stack.pop()
        if isinstance(reply, UnclearPrompt):
            raise reply
        return reply

    def _steps(self, request: Request) -> Steps:
        what, name, slot = request
        node = self.nodes.get(name)
        if node is None:
            return _missing(name, what)
        return self._samplers(node) if what == "samplers" else self._condition(node, slot) if what == "condition" else self._text(node)

    # -- which sampler -----------------------------------------------------------------------------------------------

    def _samplers(self, node: Node) -> Steps:
        """Ids of the samplers that decided the image or latent that a node gives out."""
        choice = chosen(node)
        names = [choice] if choice else [name for name in node.links if not _NOT_IMAGES.fullmatch(name.lower())]
        before: frozenset[str] = frozenset()
        for name in names:
            if name in node.links:
                try:
                    before |= yield ("samplers", *node.links[name])
                except UnclearPrompt:  # a circle: ComfyUI refuses such graphs
                    continue
        if not self._is_sampler(node) or (before and "detailer" in node.kind.lower()):  # a detailer draws parts of an image anew
            return before
        strength = self._strength(node)
        masked = any(re.search("mask|inpaint", self._kind(node.links.get(name, ("", 0)))) for name in names)
        if not before or (strength >= 1 and not masked):
            return frozenset({node.id})
        return before | {node.id} if strength > _STRONG else before

    def _is_sampler(self, node: Node) -> bool:
        if "positive" not in node.inputs and "guider" not in node.inputs:
            return bool(_SAMPLES.search(node.kind)) and bool(_conditioning(node, -1))
        return bool(_SAMPLES.search(node.kind) or not node.kind or _SETTINGS & node.inputs.keys())

    def _strength(self, node: Node) -> float:
        """The denoising of a sampler in [0,1]; 0 where it continues another's noise, or the graph does not tell."""
        denoise, start = node.inputs.get("denoise"), node.inputs.get("start_at_step")
        if isinstance(denoise, int | float):
            return float(denoise)
        if isinstance(start, int):
            steps = node.inputs.get("steps")
            share = 1 - start / steps if isinstance(steps, int) and steps > 0 else float(start == 0)
            return max(0.0, share) if node.inputs.get("add_noise") == "enable" else 0.0
        sigmas = self.nodes.get(node.links.get("sigmas", ("", 0))[0])
        denoise = sigmas.inputs.get("denoise") if sigmas else None
        if sigmas is not None and denoise is None and sigmas.kind.lower().endswith("scheduler"):
            denoise = 1.0  # from the highest level down
        noisy = "disable" not in self._kind(node.links.get("noise", ("", 0))) and node.inputs.get("add_noise") is not False
        return float(denoise) if noisy and isinstance(denoise, int | float) else 0.0

    def _kind(self, link: Link) -> str:
        return self.nodes[link[0]].kind.lower() if link[0] in self.nodes else ""

    # -- which text --------------------------------------------------------------------------------------------------

    def _condition(self, node: Node, slot: int) -> Steps:
        """The text of the conditioning that a node gives out."""
        if "zeroout" in node.kind.lower():
            return ""
        choice = chosen(node)
        if choice in node.links:
            return (yield ("condition", *node.links[str(choice)]))
        texts: list[str] = []
        for link in _conditioning(node, slot):
            texts.append((yield ("condition", *link)))
        if "concat" in node.kind.lower():
            return ", ".join(text for text in texts if text)
        if texts and not (node.kind.lower().startswith("cliptextencode")):
            return only_one(texts, f"{node} combines")
        if not texts and not text_inputs(node) and len(node.links) == 1:  # a relay
            return (yield ("condition", *next(iter(node.links.values()))))
        return only_one([*texts, (yield from self._own_text(node, encodes=True))], f"{node} combines")

    def _text(self, node: Node) -> Steps:
        """The text that a node gives out."""
        choice = chosen(node)
        if choice in node.links:
            return (yield ("text", *node.links[str(choice)]))
        if not text_inputs(node) and len(node.links) == 1 and not why_unknown(node, encodes=False):  # a relay
            return (yield ("text", *next(iter(node.links.values()))))
        return (yield from self._own_text(node, encodes=False))

    def _own_text(self, node: Node, encodes: bool) -> Steps:
        """The text of a node's own inputs, literal or linked."""
        if reason := why_unknown(node, encodes):
            raise UnclearPrompt(reason)
        choice = chosen(node)
        names = [choice] if choice else text_inputs(node)
        texts: dict[str, str] = {}
        for name in names:
            value = node.inputs[name]
            if name in node.links:
                value = yield ("text", *node.links[name])
            texts[name] = value if isinstance(value, str) else ""
        if not texts:
            raise UnclearPrompt(f"the text of {node} is not in the graph")
        if joins(node):
            delimiter = next((name for name in DELIMITERS if name in node.inputs), "")
            between = (yield ("text", *node.links[delimiter])) if delimiter in node.links else node.inputs.get(delimiter)
            return joined(node, list(texts.values()), between if isinstance(between, str) else None)
        text = rewritten(node, _of_encoders(texts, node))
        if text is None:
            raise UnclearPrompt(f"{node} changes the text in a way that is not in the graph")
        return text


def _missing(name: str, what: str) -> Steps:
    if what != "samplers":
        raise UnclearPrompt(f"node {name} is missing in the graph")
    return frozenset[str]()
    yield


def _conditioning(node: Node, slot: int) -> Sequence[Link]:
    """The links through which a node gets its positive conditioning."""
    if slot == 1 and "negative" in node.links and _PAIRS.search(node.kind) and not _SAMPLES.search(node.kind):
        return [node.links["negative"]]
    for pattern in _CONDITIONING:
        found = [link for name, link in node.links.items() if pattern.fullmatch(name.lower())]
        found.sort(key=lambda link: link is not node.links.get("conditioning_to"))  # the first part of a concatenation
        if found or (pattern is _CONDITIONING[0] and isinstance(node.inputs.get("positive"), str)):
            return found
    return []


def _of_encoders(texts: Mapping[str, str], node: Node) -> str:
    """The one text, or of several that differ the one that holds the others, or that of the encoder whose tokens are attended to."""
    short = {text: " ".join(text.split()) for text in texts.values()}
    longest = max(short, key=lambda text: len(short[text]))
    if all(text in short[longest] for text in short.values()):
        return longest
    attended = [text for name, text in texts.items() if name in TOKENS_OF and text.strip()]
    return only_one(attended or texts.values(), f"{node} takes")


def _wrote(prefix: Any, file_name: str) -> bool:
    """Whether a node with this prefix numbers its files so: `prefix_00001_.png`."""
    name = re.split(r"[/\\]", prefix)[-1] if isinstance(prefix, str) else ""
    return bool(name) and bool(re.fullmatch(re.escape(name) + r"_\d{5,}_?(\.\w+)?", file_name))
