"""CLIP's byte-pair tokenizer as files: an alphabet of bytes, merges, and four special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CONTEXT = 77  # tokens


def byte_alphabet() -> list[str]:
    """CLIP's 256 printable stand-ins for bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(folder: Path, merges: Sequence[str], pad: str = "<|endoftext|>") -> None:
    """Write what transformers' CLIPTokenizer reads; a merge is two symbols with a space between."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *(m.replace(" ", "") for m in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad, "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
