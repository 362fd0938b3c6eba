"""What single nodes of a ComfyUI graph do with texts, by the names of their classes and inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

Link = tuple[str, int]  # node, output slot

# The strongest first; then those with a number or letter behind, such as text1, string_b
TEXT_INPUTS = (
    *("populated_text", "text", "prompt", "positive", "positive_prompt", "text_positive", "user_prompt", "wildcard_text"),
    *("string", "value", "str", "source", "input", "anything", "any", "strings", "texts"),
)
ENCODERS = ("text_g", "text_l", "clip_l", "clip_g", "t5xxl", "llama", "bert", "mt5xl", "qwen25_7b")
"""Inputs of nodes that give each text encoder a text of its own."""
TOKENS_OF = ("t5xxl", "mt5xl", "qwen25_7b")
"""Those whose tokens the network attends to where the other encoder only gives a pooled vector."""
DELIMITERS = ("delimiter", "separator", "sep", "join_with")
_NUMBERED = re.compile(r"(text|string|prompt|str|input|any|value|positive|clause)_?([a-z]|\d{1,2})")
_JOINS = re.compile(r"concat|join|append|combine|merge", re.IGNORECASE)
_SWITCH = re.compile(r"switch|branch|select|\bif\b|ifelse", re.IGNORECASE)
_SELECTORS = ("select", "input", "selected", "index", "switch", "choice", "boolean", "condition", "cond")
_TRUE, _FALSE = ("on_true", "tt_value", "if_true", "true_value", "true"), ("on_false", "ff_value", "if_false", "false_value", "false")
_SHOWS = re.compile(r"show|preview|display|debug", re.IGNORECASE)
_RUNTIME = re.compile(
    r"ollama|llm|vlm|gpt|openai|claude|anthropic|gemini|deepseek|qwen|llama|mistral|groq|grok|kimi|joy.?caption|florence|moondream|blip|"
    r"caption|interrogat|tagger|describe|chat|expan|enhanc|super.?prompt|translat|random|(?<!multi)line|list|file|schedule|travel|batch|csv|"
    r"clipboard|history|regex|json|prompt.?(gen|build|craft|mak)",
    re.IGNORECASE,
)
_MODEL_INPUTS = re.compile(
    r"model(_name)?|llm\w*|system(_prompt)?|temperature|max_(new_)?(tokens|length)|top_[pk]|api_key|(base_)?url|images?|instructions?|keep_alive"
)
_REWRITES = re.compile(
    r"replace|truncat|format|substring|slice|split|strip|substitut|(text|string).?(remove|crop|cut|parse)", re.IGNORECASE
)
_REWRITING = re.compile(r"(find|replace|replacement|truncate|search|pattern)(_?\d+|_\w+)?")
_WILDCARDS = re.compile(r"\{[^{}]*\|[^{}]*\}|__[\w./*-]+__")
_RESOLVES = re.compile(r"wildcard|dynamic|dprandom", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Node:
    """A node of an API graph, with those of its inputs that are links."""

    id: str
    kind: str
    inputs: Mapping[str, Any]
    links: Mapping[str, Link]

    def __str__(self) -> str:
        return f"node {self.id} ({self.kind})" if self.kind else f"node {self.id}"


def read_nodes(graph: Mapping[str, Any]) -> Mapping[str, Node]:
    """The nodes of an API graph by id; entries that are not nodes are left out."""
    nodes: dict[str, Node] = {}
    for name, entry in graph.items():
        inputs = cast(dict[str, Any], entry).get("inputs") if isinstance(entry, dict) else None
        if isinstance(inputs, dict):
            values = cast(dict[str, Any], inputs)
            links = {key: link for key, value in values.items() if (link := _link(value))}
            nodes[str(name)] = Node(str(name), str(cast(dict[str, Any], entry).get("class_type", "")), values, links)
    return nodes


def _link(value: Any) -> Link | None:
    if not isinstance(value, list):
        return None
    pair = cast(list[Any], value)
    if len(pair) != 2 or not isinstance(pair[0], str | int) or not isinstance(pair[1], int):
        return None
    return str(pair[0]), pair[1]


def is_switch(node: Node) -> bool:
    """Whether a node passes one of its inputs on."""
    return bool(_SWITCH.search(node.kind)) and "string" not in node.kind.lower().replace("switch", "")


def chosen(node: Node) -> str | None:
    """The input that a switch passes on; None where it is not a switch, or what it passes on is decided while the graph runs."""
    if not is_switch(node):
        return None
    numbered = [(int(match[1]), name) for name in node.inputs if (match := re.search(r"(\d+)$", name))]
    numbers = dict(numbered)
    if len(numbers) < len(numbered):  # positive_1 beside negative_1: which of them goes on depends on the output
        return None
    by_name = {name.lower(): name for name in node.inputs}
    if "any" in node.kind.lower() and numbers and not any(selector in by_name for selector in _SELECTORS):
        connected = [name for _, name in sorted(numbers.items()) if name in node.links]
        return connected[0] if connected else None  # unconnected inputs are not in the graph
    for selector in _SELECTORS:
        value = node.inputs.get(by_name.get(selector, ""))
        if isinstance(value, bool):
            return next((by_name[name] for name in (_TRUE if value else _FALSE) if name in by_name), None)
        if isinstance(value, int) and (selector != "index" or 0 in numbers):
            return numbers.get(value)
    return None


def joins(node: Node) -> bool:
    """Whether a node joins its texts."""
    return bool(_JOINS.search(node.kind)) and "regex" not in node.kind.lower()


def text_inputs(node: Node) -> Sequence[str]:
    """The inputs that may hold a node's text: the strongest name's, or all numbered ones."""
    if is_switch(node):
        return sorted((name for name in node.inputs if name.lower() in (*_TRUE, *_FALSE) or re.search(r"_?\d+$", name)), key=_natural)
    if joins(node):
        return sorted((name for name in node.inputs if name.lower() in TEXT_INPUTS or _NUMBERED.fullmatch(name.lower())), key=_natural)
    by_name = {name.lower(): name for name in node.inputs if isinstance(node.inputs[name], str) or name in node.links}
    if _SHOWS.search(node.kind):  # beside the link, the text of an earlier run
        by_name = {name: own for name, own in by_name.items() if own in node.links}
    populated = node.inputs.get("populated_text")
    strongest = next((by_name[name] for name in TEXT_INPUTS if name in by_name and (name != "populated_text" or populated)), None)
    encoders = [by_name[name] for name in ENCODERS if name in by_name]
    if encoders and (strongest is None or node.inputs.get("with_SDXL") is True):
        return encoders
    return (
        [strongest] if strongest is not None else sorted((own for name, own in by_name.items() if _NUMBERED.fullmatch(name)), key=_natural)
    )


def _natural(name: str) -> tuple[str, int, str]:
    match = re.fullmatch(r"(.*?)_?(\d*)", name.lower())
    return (match[1], int(match[2] or 0), name) if match else (name, 0, name)


def why_unknown(node: Node, encodes: bool) -> str:
    """Why the text that a node gives out is not in the graph; "" where it is."""
    if encodes or is_switch(node):  # what turns text into conditioning has models and images of its own
        return ""
    if _RUNTIME.search(node.kind) or any(_MODEL_INPUTS.fullmatch(name.lower()) for name in node.inputs):
        return f"the text is written by {node} while the graph runs"
    text = node.inputs.get("text")
    if _RESOLVES.search(node.kind) and not node.inputs.get("populated_text") and isinstance(text, str) and _WILDCARDS.search(text):
        return f"{node} chooses its wildcards while the graph runs"
    return ""


def joined(node: Node, texts: Sequence[str], delimiter: str | None) -> str:
    """The texts of a node that joins them; blank ones have no delimiter, except in ComfyUI's own node."""
    if node.kind == "StringConcatenate":
        return (delimiter or "").join(texts)
    between = {None: ", ", "comma": ", ", "space": " ", "newline": "\n", "\\n": "\n"}.get(delimiter, delimiter)
    return str(between).join(text for text in texts if text.strip())


def rewritten(node: Node, text: str) -> str | None:
    """What ComfyUI's own text nodes make of a text; None where a node rewrites it in a way that is not known here."""
    given = node.inputs.get
    if node.kind == "StringReplace":
        find, new = given("find"), given("replace")
        return text.replace(find, new) if isinstance(find, str) and isinstance(new, str) else None
    if node.kind == "StringSubstring":
        start, end = given("start"), given("end")
        return text[start:end] if isinstance(start, int) and isinstance(end, int) else None
    if node.kind == "CaseConverter":
        change = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
        return change[given("mode", "")](text) if given("mode") in change else None
    if node.kind != "StringTrim" and (_REWRITES.search(node.kind) or any(_REWRITING.fullmatch(name.lower()) for name in node.inputs)):
        return None
    return text  # also StringTrim: blanks at the ends do not count
