"""A LoRA from full fine-tuning: the low-rank part of every changed matrix, by singular value decomposition."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ConfigError
from . import names
from .layouts import Adapter, Update
from .scales import is_scale

OVERSAMPLING = 16  # random directions beyond the rank


def extract(base: Path, tuned: Path, rank: int, exact: bool = False, device: str = "cpu") -> tuple[Adapter, dict[str, float]]:
    """The nearest LoRA of that rank for every matrix of the denoiser (Eckart & Young 1936), and how much of the change it keeps.

    `retained`: share of ‖ΔW‖² over all weights; `vectors`: share that lies in biases and norms. Unchanged modules get
    no LoRA. Models are single files or diffusers folders; both must have the same names and shapes. `exact`, `device`: see
    `low_rank`.
    """
    before, after = _Weights(base), _Weights(tuned)
    different = sorted(set(before.files) ^ set(after.files))
    if different:
        raise ConfigError(f"{base} and {tuned} differ in {len(different)} weights, first {different[0]}: give two models of one layout")

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(before.files):
            old, new = before.read(name), after.read(name)
            if old.shape[:2] != new.shape[:2] or old.numel() != new.numel():  # a 1×1 kernel is a matrix
                raise ConfigError(f"{name} has shape {tuple(old.shape)} in {base}, {tuple(new.shape)} in {tuned}")
            yield name, new.double().reshape(old.shape) - old.double()

    return _low_rank_adapter(changes(), len(before.files), rank, exact, device)


def extract_delta(tensors: Mapping[str, Tensor], rank: int, exact: bool = False, device: str = "cpu") -> tuple[Adapter, dict[str, float]]:
    """As `extract`, from the tensors of a delta file."""
    changes = ((names.of_delta(key), change.double()) for key, change in sorted(tensors.items()))
    return _low_rank_adapter(changes, len(tensors), rank, exact, device)


def _low_rank_adapter(
    changes: Iterator[tuple[str, Tensor]], count: int, rank: int, exact: bool, device: str
) -> tuple[Adapter, dict[str, float]]:
    from tqdm import tqdm

    if rank < 1:
        raise ConfigError(f"--rank {rank}: give at least 1")
    updates: dict[str, Update] = {}
    total = vectors = lost = 0.0
    for name, change in tqdm(changes, total=count, unit="weight", desc="extract"):
        energy = float(change.square().sum())
        total += energy
        if energy == 0:
            continue
        if not math.isfinite(energy):
            raise ConfigError(f"the change of {name} is not finite: one of the models is damaged")
        if change.ndim < 2 or not name.endswith(".weight"):
            vectors += energy
            continue
        update = low_rank(change, rank, exact, device)
        lost += max(energy - float(torch.linalg.matrix_norm(update.up.flatten(1).double() @ update.down.flatten(1).double()) ** 2), 0.0)
        module = names.plain(name.removesuffix(".weight"))
        try:
            parts = names.canonical(module, len(update.up), update.down.shape[1])
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{name} is a weight of no known model: {error}") from error
        for part, rows in parts.items():
            updates[part] = Update(update.down, update.up[rows].contiguous(), update.alpha)
    if not updates:
        raise ConfigError("no matrix has changed: there is nothing to extract")
    return Adapter(updates), {"retained": 1 - (lost + vectors) / total, "vectors": vectors / total}


def low_rank(change: Tensor, rank: int, exact: bool = False, device: str = "cpu") -> Update:
    """The nearest update of that rank, √S on either side; a kernel (out,in,kh,kw) keeps its size in `down`.

    A randomised decomposition in float32 on `device` (Halko et al. 2011, arXiv:0909.4061), which draws from torch's global
    generator. Its error ‖ΔW − BA‖ was at most 1.001 times the minimum on changes that training made. `exact` decomposes
    the whole matrix in float64 on the CPU.
    """
    matrix, size = change.flatten(1), rank + OVERSAMPLING
    if exact or size >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        u, s, v = (part.cpu() for part in torch.svd_lowrank(matrix.float().to(device), q=size, niter=4))
        vh = v.T
    keep = min(rank, int((s > s[0] * 1e-6).sum()))
    up, down = u[:, :keep] * s[:keep].sqrt(), s[:keep, None].sqrt() * vh[:keep]
    if change.ndim == 4:
        up, down = up[:, :, None, None], down.reshape(keep, *change.shape[1:])
    return Update(down.float().contiguous(), up.float().contiguous(), float(keep))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a denoiser: a single file, its diffusers folder, or the folder of its whole model.

    Of a folder those that diffusers loads: the shards that an index names, or the one file without a variant (fp16, ema).
    """
    for folder in (path / "unet", path / "transformer", path):
        files = sorted(folder.glob("*.safetensors"))
        indices = [index for index in folder.glob("*.safetensors.index.json") if index.name.count(".") == 3]
        if indices:
            return _shards(indices[0])
        if files:
            plain = [file for file in files if file.name.count(".") == 1]
            return plain or files
    if path.is_file():
        return [path]
    raise ConfigError(f"no weights at {path}: give a .safetensors file, or a folder that has some")


def _shards(index: Path) -> list[Path]:
    try:
        files = sorted({index.parent / str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not an index of shards: {type(error).__name__} {error}") from error
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ConfigError(f"{index} names {missing.name}, which is not there: the model is incomplete")
    return files


class _Weights:
    """A denoiser's weights by name, read one at a time; `files` maps a name to (file, key)."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, tuple[Path, str]] = {}
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    keys: list[str] = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is not a readable safetensors file: {error}") from error
            prefix = "model.diffusion_model."  # of the denoiser in original checkpoints; a diffusers file is all denoiser
            inside = [key for key in keys if key.startswith(prefix)] or keys
            scales = next((key for key in inside if is_scale(key)), None)
            if scales is not None:
                raise ConfigError(f"{file} is quantised ({scales}): give the model in float32, float16 or bfloat16")
            self.files |= {key.removeprefix(prefix): (file, key) for key in inside}

    def read(self, name: str) -> Tensor:
        file, key = self.files[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)
