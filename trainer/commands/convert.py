"""`python -m trainer convert`: a LoRA in another layout, or one extracted from full fine-tuning."""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path

import torch

from ..config import ConfigError
from ..lora.extract import extract, extract_delta, weight_files
from ..lora.file import PEFT_CONFIG, PEFT_WEIGHTS, read_adapter, read_lora, write_adapter
from ..lora.layouts import LAYOUTS, Adapter
from ..lora.names import is_delta
from ..models.lora_family import for_family
from ..models.open import denoiser_hashes
from ..runtime.files import files_hash
from .options import add_device, device_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert`."""
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="[IN] OUT", help="LoRA file, peft folder or weight differences, and the output path")
    add("--to", choices=LAYOUTS, help="layout to write (default: kohya for UNets, diffusers for transformers)")
    add("--base", type=Path, metavar="MODEL", help="model before full fine-tuning: with --tuned, or to check the differences IN against")
    add("--tuned", type=Path, metavar="MODEL", help="model after full fine-tuning, in the same layout; without IN")
    add("--model", default="", metavar="MODEL", help="diffusers folder or checkpoint that the LoRA is for (default: the published model)")
    add("--without-text-encoders", action="store_true", help="leave out what the LoRA changes in text encoders")
    add("--rank", type=int, default=64, metavar="N", help="rank of the extracted LoRA (default 64)")
    add("--exact", action="store_true", help="extract by a full SVD in float64, 20 to 70 times slower (default: randomised)")
    add("--overwrite", action="store_true", help="replace OUT")
    add_device(parser)
    parser.usage = "python -m trainer convert [-h] [IN] OUT [--base MODEL --tuned MODEL] [--to LAYOUT] [--rank N] [--exact] [--device NAME]"


def run(args: argparse.Namespace) -> int:
    """Convert a LoRA between layouts (kohya, diffusers, peft), or extract one from full fine-tuning.

    Every module must be one of a known model's. What was written is read back before success is reported.
    """
    base: Path | None = args.base
    tuned: Path | None = args.tuned
    *sources, out = typing.cast(list[Path], args.paths)
    if (tuned is not None and (sources or base is None)) or (base is not None and not sources and tuned is None):
        raise ConfigError("extraction takes --base MODEL --tuned MODEL and one path to write")
    if tuned is None and len(sources) != 1:
        raise ConfigError("give the LoRA to read and the path to write")
    if _is_finished(out) and not args.overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to replace it")
    torch.manual_seed(0)  # the same input gives the same file
    if base is not None and tuned is not None:
        adapter, note = extract(base, tuned, args.rank, args.exact, device_of(args))
        header = {"imagerefl": json.dumps({"base": files_hash(weight_files(base)), "extracted": note})}
        _print_note(adapter, note, args.rank)
    else:
        adapter, header = _read(sources[0], base, args)
    described = [str(folder) for folder in (base, base and base / "unet", base and base / "transformer") if folder and _is_denoiser(folder)]
    adapter, family = for_family(adapter, str(sources[0] if sources else tuned), args.model, described)
    layout = args.to or ("kohya" if adapter.root == "unet" else "diffusers")
    try:
        write_adapter(adapter, out, layout, header)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {out} ({layout}, {len(adapter.updates)} modules {family}): every key read back")
    return 0


def _is_finished(out: Path) -> bool:
    """Whether something is there; not for a peft folder that was being written when it was interrupted: its weights come last."""
    if not out.is_dir():
        return out.exists()
    unfinished = {PEFT_CONFIG, f"{PEFT_CONFIG}.partial", f"{PEFT_WEIGHTS}.partial", f"{PEFT_WEIGHTS}.writing"}
    return any(path.name not in unfinished for path in out.iterdir())


def _read(source: Path, base: Path | None, args: argparse.Namespace) -> tuple[Adapter, dict[str, str]]:
    """The adapter of a LoRA or delta file, and the header to write with it."""
    tensors, metadata, header = read_lora(source)
    if is_delta(tensors):
        if base is not None and metadata.get("base") not in denoiser_hashes(base):
            raise ConfigError(f"{source} was not trained on {base}: their hashes differ")
        adapter, note = extract_delta(tensors, args.rank, args.exact, device_of(args))
        _print_note(adapter, note, args.rank)
        return adapter, {"imagerefl": json.dumps({**metadata, "extracted": note})}
    if base is not None:
        raise ConfigError("extraction takes --base MODEL --tuned MODEL and one path to write")
    adapter = read_adapter(source)
    text = adapter.left_out
    if not adapter.updates:
        raise ConfigError(f"{source} adapts text encoders alone")
    if text and not args.without_text_encoders:
        raise ConfigError(
            f"{source} also adapts text encoders, {len(text)} modules, first {text[0]}, which are not tuned here: "
            "add --without-text-encoders to leave them out"
        )
    if text:
        print(f"left out: {len(text)} modules of text encoders")
    return adapter, header


def _is_denoiser(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _print_note(adapter: Adapter, note: dict[str, float], rank: int) -> None:
    print(f"{len(adapter.updates)} modules, rank at most {rank}: the LoRA holds {note['retained']:.1%} of the change's energy")
    if note["vectors"] > 1e-3:
        print(f"{note['vectors']:.1%} of the change lies in biases and norms, which a LoRA cannot hold")
