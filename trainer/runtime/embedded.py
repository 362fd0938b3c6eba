"""The weight files that are part of this package: whether they are there and whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
PIPELINE = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
REMEDY = "reinstall the package or, in a clone, run `git checkout -- trainer/demo/weights`"


def check_files(folder: Path, *names: str) -> None:
    """ValueError with the file's name and the remedy where one is missing, empty, cut short or not of its format."""
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ValueError(f"{path} is missing: {REMEDY}")
        try:
            _read(path)
        except (SafetensorError, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): {REMEDY}") from error


def _read(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):  # compares the header with the file's length
            pass
    elif path.suffix == ".json":
        json.loads(path.read_text("utf-8"))
    elif path.suffix == ".gz":
        gzip.decompress(path.read_bytes())
