"""LoRA files from one layout to another, and from a full fine-tune by singular value decomposition."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ConfigError
from ..lora import delta
from ..lora.file import PEFT_WEIGHTS, read_adapter, read_lora, write_adapter
from ..lora.layouts import LAYOUTS, Adapter, Update, canonical, plain_name
from ..runtime.hashes import file_hash


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m trainer convert`."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="[IN] OUT", help="LoRA file, peft folder or delta of a full fine-tune, and where to write"
    )
    parser.add_argument("--to", choices=LAYOUTS, help="layout to write (default: kohya for UNets, diffusers for transformers)")
    parser.add_argument(
        "--base",
        type=Path,
        help="the model before a full fine-tune (file or folder): with --tuned and OUT alone, or to check a delta against",
    )
    parser.add_argument("--tuned", type=Path, help="the model after it, in the same layout")
    parser.add_argument("--rank", type=int, default=64, help="rank of the extracted LoRA (default 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.usage = (
        "python -m trainer convert [-h] IN OUT [--to LAYOUT] [--rank N] | OUT --base MODEL --tuned MODEL [--rank N] [--to LAYOUT]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Turn a LoRA's layout into another (kohya, diffusers, peft), or extract one from a full fine-tune.

    What was written is read back before success is reported.
    """
    base: Path | None = arguments.base
    tuned: Path | None = arguments.tuned
    *sources, out = typing.cast(list[Path], arguments.paths)
    differences = read_lora(sources[0])[0] if len(sources) == 1 and sources[0].is_file() and tuned is None else {}
    whole = delta.is_delta(differences)
    extracting = not sources and base is not None and tuned is not None
    if not whole and not extracting and (base is not None or tuned is not None):
        raise ConfigError("extraction takes --base MODEL --tuned MODEL and one path to write")
    if not extracting and len(sources) != 1:
        raise ConfigError("give the LoRA to read and the path to write")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to replace it")
    note: dict[str, float] = {}
    if whole:
        metadata = read_lora(sources[0])[1]
        if base is not None and metadata.get("base") != _hash(base):
            raise ConfigError(f"{sources[0]} was not trained on {base}: their hashes differ")
        adapter, note = _low_rank(_changes(differences), len(differences), arguments.rank)
        header = {"imagerefl": json.dumps({**metadata, "extracted": note})}
    elif base is not None and tuned is not None:
        adapter, note = extract(base, tuned, arguments.rank)
        header = {"imagerefl": json.dumps({"base": _hash(base), "extracted": note})}
    else:
        (source,) = sources
        adapter = read_adapter(source)
        header = read_lora(source / PEFT_WEIGHTS if source.is_dir() else source)[2]
        if adapter.left_out:
            print(f"left out: {len(adapter.left_out)} modules of text encoders")
        if not adapter.updates:
            raise ConfigError(f"{source} adapts text encoders alone")
    if note:
        print(
            f"{len(adapter.updates)} modules, rank at most {arguments.rank}: the LoRA holds {note['retained']:.1%} of the change's energy"
        )
    if note.get("vectors", 0) > 1e-3:
        print(f"{note['vectors']:.1%} of the change lies in biases and norms, which a LoRA cannot hold")
    layout = arguments.to or ("kohya" if adapter.root == "unet" else "diffusers")
    try:
        write_adapter(adapter, out, layout, header)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {out} ({layout}, {len(adapter.updates)} modules): every key read back")
    return 0


# -- a full fine-tune as a LoRA ----------------------------------------------------------------------------------------


def extract(base: Path, tuned: Path, rank: int) -> tuple[Adapter, dict[str, float]]:
    """The best LoRA of that rank for every matrix of the denoiser (Eckart & Young 1936), and what it holds.

    `retained`: share of ‖ΔW‖² over all weights; `vectors`: share that lies in biases and norms. Unchanged modules get
    no LoRA. Models are single files or diffusers folders; both must be of one layout.
    """
    before, after = _Weights(base), _Weights(tuned)
    odd = sorted(set(before.files) ^ set(after.files))
    if odd:
        raise ConfigError(f"{base} and {tuned} differ in {len(odd)} weights, first {odd[0]}: give two models of one family and layout")

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(before.files):
            old, new = before.read(name), after.read(name)
            if old.shape != new.shape:
                raise ConfigError(f"{name} has shape {tuple(old.shape)} in {base}, {tuple(new.shape)} in {tuned}")
            yield name, new.double() - old.double()

    return _low_rank(changes(), len(before.files), rank)


def _changes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights' names and changes from the tensors of a delta file."""
    for key, change in sorted(tensors.items()):
        stem, kind = delta.stem_and_kind(key)
        yield f"{plain_name(stem)}.{kind}", change.double()


def _hash(model: Path) -> str:
    return file_hash(weight_files(model)[0])


def _low_rank(changes: Iterator[tuple[str, Tensor]], count: int, rank: int) -> tuple[Adapter, dict[str, float]]:
    """The LoRA of `count` weights' changes by name, and what it holds."""
    from tqdm import tqdm

    if rank < 1:
        raise ConfigError(f"--rank {rank}: give at least 1")
    updates: dict[str, Update] = {}
    total = vectors = missed = 0.0
    for name, change in tqdm(changes, total=count, unit="weight", desc="extract"):
        energy = float(change.square().sum())
        total += energy
        if energy == 0:
            continue
        if change.ndim < 2 or not name.endswith(".weight"):
            vectors += energy
            continue
        update = low_rank(change, rank)
        missed += max(energy - float(torch.linalg.matrix_norm(update.up.flatten(1).double() @ update.down.flatten(1).double()) ** 2), 0.0)
        module = plain_name(name.removesuffix(".weight"))
        for part, rows in canonical(module, len(update.up), update.down.shape[1]).items():
            updates[part] = Update(update.down, update.up[rows].contiguous(), update.alpha)
    if not updates:
        raise ConfigError("no matrix has changed: there is nothing to extract")
    root = "unet" if any(n.startswith(("down_blocks", "up_blocks", "mid_block")) for n in updates) else "transformer"
    return Adapter(root, updates), {"retained": 1 - (missed + vectors) / total, "vectors": vectors / total}


def low_rank(change: Tensor, rank: int) -> Update:
    """The nearest update of that rank, √S on either side; a kernel (out,in,kh,kw) keeps its size in `down`."""
    matrix = change.flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    keep = min(rank, int((s > s[0] * 1e-6).sum()))
    up, down = u[:, :keep] * s[:keep].sqrt(), s[:keep, None].sqrt() * v[:keep]
    if change.ndim == 4:
        up, down = up[:, :, None, None], down.reshape(keep, *change.shape[1:])
    return Update(down.float().contiguous(), up.float().contiguous(), float(keep))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a denoiser: a single file, its diffusers folder, or the folder of its whole model."""
    for folder in (path / "unet", path / "transformer", path):
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
    if path.is_file():
        return [path]
    raise ConfigError(f"no weights at {path}: give a .safetensors file, or a folder that has some")


class _Weights:
    """A denoiser's weights by name, read one at a time: `files` says where each lies."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, tuple[Path, str]] = {}
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    names: list[str] = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is no readable safetensors file: {error}") from error
            self.files |= {name: (file, key) for name, key in _denoiser(names)}

    def read(self, name: str) -> Tensor:
        file, key = self.files[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)


def _denoiser(names: list[str]) -> Iterator[tuple[str, str]]:
    """What of a file is the denoiser: all of it, or what lies under the original checkpoints' prefix."""
    prefix = "model.diffusion_model."
    inside = [name for name in names if name.startswith(prefix)] or names
    return ((name.removeprefix(prefix), name) for name in inside)
