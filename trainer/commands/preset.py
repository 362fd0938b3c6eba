"""`python -m trainer preset`."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from ..config import ConfigError, likely
from ..objectives import OBJECTIVES
from ..runtime.files import named, quoted, write_text
from ..training.preset_types import Line, Row, quote
from ..training.presets import METHODS, ROWS, SHORT

_COMMENTS_AT = 40
_DATA: dict[str, Line] = {
    "prompts": ("prompts", quote("data/prompts.txt"), "one per line"),
    "images": ("images", quote("data/captioned"), "images with a .txt caption beside each"),
    "pairs": ("pairs", quote("data/pairs.csv"), "columns chosen, rejected, prompt; or a folder with liked/ and disliked/"),
    "labels": ("labels", quote("data/rated"), "a folder with liked/ and disliked/; or a table with a column label"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `preset`."""
    parser.add_argument("method", nargs="?", metavar="METHOD", help="an objective, as `--list` names it")
    parser.add_argument("--model", metavar="FAMILY", help="a published model, as `--list` names it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--list", action="store_true", help="list objectives and models")


def run(args: argparse.Namespace) -> int:
    """Print or write a preset; returns the exit status."""
    if args.list:
        titles = {name: OBJECTIVES[name].title for name in METHODS}, {name: row.title for name, row in ROWS.items()}
        for heading, rows in zip(("METHOD", "FAMILY"), titles):
            print(heading, *(f"  {name:<16} {title}" for name, title in rows.items()), sep="\n")
        return 0
    if not args.method or not args.model:
        raise ConfigError("give METHOD and --model FAMILY, or --list")
    if args.model == "demo":
        raise ConfigError("the embedded model has its presets in the folder presets: imagerefl-demo.toml, refl-demo.toml, and others")
    text = text_of(args.method, args.model, args.out.stem if args.out else "")
    if args.out is None:
        print(text, end="")
        return 0
    if args.out.is_dir():
        raise ConfigError(f"--out {named(args.out)} is a folder: give a file, such as {args.method}-{args.model}.toml")
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists: --overwrite replaces it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, args.out)
    keys = ["model", METHODS[args.method].data, *(["reward"] if OBJECTIVES[args.method]().needs_reward else []), "watch.heldout"]
    train = f"python -m trainer train {quoted(args.out)}"
    print(f"wrote {args.out}; the memory that it takes, before any file is there: {train} --model={args.model} --plan")
    print(f"set {', '.join(keys[:-1])} and {keys[-1]} in it, then: {train}")
    return 0


def model_name(name: str) -> str:
    """The published model of a name on the command line; ConfigError with the nearest one otherwise."""
    name = SHORT.get(name, name)
    if name in ROWS:
        return name
    near = difflib.get_close_matches(name, [*ROWS, *SHORT], 1, 0.4)
    raise ConfigError(f"no family {name!r}: {f'did you mean {near[0]}? ' if near else ''}known are {', '.join(ROWS)}")


def text_of(method: str, model: str, stem: str = "") -> str:
    """The TOML file for an objective and a published model; `stem` names its output folder (default METHOD-MODEL)."""
    if method not in METHODS:
        raise ConfigError(f"no objective {method!r}: {likely(method, METHODS)}use one of {', '.join(METHODS)}")
    settings, row = METHODS[method], ROWS[model_name(model)]
    samples = settings.samples_of(row)
    stem = stem or f"{method}-{model}"
    data, batch = _DATA[settings.data], max(row.batch, settings.least)
    general: list[Line] = [
        ("out", quote(f"runs/{stem}"), ""),
        ("model", quote(f"models/{row.folder}"), row.file),
        data,
        *settings.inputs(row),
        ("reward", quote(settings.reward), f"python -m trainer rewards download {settings.reward}"),
        settings.standardise,
        ("device", '"cuda"', ""),
        settings.steps,
        ("batch_size", str(batch), ""),
        ("gradient_accumulation_steps", str(samples // batch), ""),
        ("learning_rate", settings.rate, ""),
        *settings.more,
        *settings.recomputed(row),
        ("save_every", str(settings.save_every), ""),
    ]
    watch: list[Line] = [
        ("every", str(settings.every), ""),
        ("heldout", quote(settings.heldout), f"python -m trainer rewards download {settings.heldout}"),
    ]
    watch += settings.watch(row)
    tables = {
        "model_options": [("dtype", '"bfloat16"', "of the frozen weights; the adapter is float32")],
        "objective": [("name", quote(method), ""), *settings.objective(row)],
        "lora": [("rank", str(row.rank), ""), ("alpha", f"{row.rank:.1f}", "")],
        "watch": [*watch, ("patience", "3", "")],
    }
    lines = [
        f"# {OBJECTIVES[method].title} on {row.title}: {settings.origin}.",
        *([] if OBJECTIVES[method].trains_distilled else _warning(row)),
        *map(_written, general),
    ]
    lines.insert(-len(general) + 3, f"# image_size = {row.size} pixels, the model's own, where none is given")
    for name, table in tables.items():
        note = "                                  # judged by a reward that is not trained on; without its weights, delete this table"
        lines += ["", f"[{name}]{note if name == 'watch' else ''}", *map(_written, table)]
    if row.turbo[0]:
        drawn: list[Line] = [
            ("tuned_model", quote(f"models/{row.turbo[0]}"), "evaluations then draw with the turbo model and the LoRA, without guidance"),
            ("tuned_steps", str(row.turbo[1]), "of its own schedule"),
        ]
        lines += [f"# {_written(line)}" for line in drawn]
    return "\n".join(lines) + "\n"


def _warning(row: Row) -> list[str]:
    if not row.few:
        return []
    lines = [
        "# This model is distilled to few steps, which training undoes: train its base model where there is one, and draw with this one."
    ]
    if row.training_adapter:
        adapter = f'# training_adapter = "models/loras/{row.training_adapter}.safetensors"'
        lines.append(f"{adapter}  # or train with this; steps and guidance are then the base model's")
    return lines


def _written(line: Line) -> str:
    key, value, comment = line
    return f"{key} = {value}".ljust(_COMMENTS_AT) + f" # {comment}" if comment else f"{key} = {value}"


def command_for(path: Path) -> str:
    """The command that writes a preset of that file's name, "" where it is none."""
    for method in METHODS:
        prefix, _, model = path.stem.partition(f"{method}-")
        if path.suffix == ".toml" and not prefix and (model in ROWS or model in SHORT):
            return f"python -m trainer preset {method} --model {model} --out {quoted(path)}"
    return ""
