"""Text encoders and autoencoders in files of their own, in the names that ComfyUI's have, and the folders where ComfyUI keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..lora.scales import is_scale
from .configs import QWEN_AUTOENCODER, T5, Config, ModelConfig, PartClass
from .quantised import read_scaled
from .quiet import without_dtype_warning
from .single_file import converter, load_part, one_line_errors, tensor_shapes

_NETWORKS = ("diffusion_models", "unet")
_FOLDERS = {"text_encoder": ("text_encoders", "clip"), "vae": ("vae",)}
_TEXT_PREFIX = re.compile(r"^(text_encoders\.\w+\.transformer\.)?(model\.)?(language_model\.)?")
_HEAD = "lm_head.weight"
_OPTIONAL = (_HEAD, "num_batches_tracked")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""Qwen3's chat template for one message; the tokenizer that ComfyUI brings has Qwen2.5's, which adds a system prompt."""


def models_folder(network: Path) -> Path | None:
    """ComfyUI's `models` where a network's file lies in its `diffusion_models` (or `unet`), or in a folder there."""
    return next((folder.parent for folder in network.resolve().parents if folder.name in _NETWORKS), None)


def find_part(network: Path, name: str, config: ModelConfig, given: str, parts: Path | None) -> Path:
    """The file or folder of a text encoder or autoencoder: `given`, a folder of `parts`, or the file in ComfyUI's folders that fits.

    Reads headers alone. Raises FileNotFoundError or ValueError that name the file and where ComfyUI keeps it.
    """
    if given:
        if not Path(given).exists():
            raise FileNotFoundError(f"no file {given} ({name})")
        return _checked(Path(given), network, name, config)
    if parts is not None and (parts / name).is_dir():
        return parts / name
    root, expected = models_folder(network), config.files.get(name, "")
    folders = [root / folder for folder in _FOLDERS[name] if (root / folder).is_dir()] if root else []
    fitting = [file for folder in folders for file in sorted(folder.rglob("*.safetensors")) if _fits(file, *config.parts[name])]
    best = next((file for file in fitting if file.name == expected), fitting[0] if len(fitting) == 1 else None)
    if best is not None:
        return best
    namesake = next((folder / expected for folder in folders if (folder / expected).is_file()), None)
    if namesake is not None:
        return _checked(namesake, network, name, config)
    place = f"models/{_FOLDERS[name][0]}/{expected}"
    if fitting:
        raise ValueError(f"{network} may use {', '.join(file.name for file in fitting)}: name one ({name} = FILE)")
    raise FileNotFoundError(
        f"{network} needs its {name}, in ComfyUI {place}: name it ({name} = FILE), or a diffusers folder (parts = FOLDER)"
    )


def _checked(file: Path, network: Path, name: str, config: ModelConfig) -> Path:
    wrong = _differences(file, *config.parts[name]) if file.is_file() else ""
    if wrong:
        raise ValueError(f"{file} is not the {name} of {network.name}: {wrong}")
    return file


def load_file_part(path: Path, part: PartClass, settings: Config, dtype: torch.dtype) -> Any:
    """A text encoder or autoencoder from its file (`find_part`), or from a diffusers folder."""
    if path.is_dir():
        return load_part(path, part, dtype)
    module = _empty(part, settings)
    with one_line_errors(path):
        state = _converted(part, settings, read_scaled(path, dtype))
    if _HEAD in module.state_dict() and _HEAD not in state:  # its output is used by nothing
        state[_HEAD] = next(value for key, value in state.items() if key.endswith("embed_tokens.weight"))
    with without_dtype_warning():
        module.load_state_dict({**dict(module.named_buffers()), **state}, assign=True, strict=False)
    if part[0] == "transformers":
        module.tie_weights()
    return module.eval()


def find_tokenizer(network: Path, name: str, config: ModelConfig, parts: Path | None) -> Any:
    """The tokenizer `name` of a folder of `parts`, of the ComfyUI that the network's file lies in, or of the hub's cache."""
    from transformers import AutoTokenizer

    root, is_t5 = models_folder(network), bool(config.t5) or name == "t5_tokenizer"
    ours = root.parent / "comfy" / "text_encoders" / ("t5_tokenizer" if is_t5 else "qwen25_tokenizer") if root else None
    if parts is not None and (parts / name).is_dir():
        return load_part(parts / name, ("transformers", "AutoTokenizer"), torch.float32)
    if ours is not None and ours.is_dir():
        with one_line_errors(ours):
            tokenizer: Any = AutoTokenizer.from_pretrained(ours)
        if not is_t5:
            tokenizer.chat_template = _CHAT
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(config.repository, subfolder=name, local_files_only=True)
    except (OSError, ValueError) as error:
        get = f"hf download {config.repository} --include '{name}/*'"
        raise FileNotFoundError(
            f"{network} lies in no ComfyUI, which would bring its tokenizer: run `{get}`, or name a folder with {name}/ (parts = FOLDER)"
        ) from error


def _fits(file: Path, part: PartClass, settings: Config) -> bool:
    try:
        return not _differences(file, part, settings)
    except ValueError:  # a file that is damaged, or another program's
        return False


@cache
def _wanted(part: PartClass, settings: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in _empty(part, json.loads(settings)).state_dict().items()}


def _differences(file: Path, part: PartClass, settings: Config) -> str:
    """How the tensors of a file differ from those of a part, "" where they do not; shapes alone are read."""
    wanted = _wanted(part, json.dumps(settings))
    given = {key: torch.empty(shape, device="meta") for key, shape in tensor_shapes(file).items()}
    try:
        found = {key: tuple(value.shape) for key, value in _converted(part, settings, given).items()}
    except (KeyError, IndexError, RuntimeError, ValueError):  # a converter that misses what it expects
        found = {}
    wrong = [key for key, shape in wanted.items() if found.get(key, shape if key.endswith(_OPTIONAL) else None) != shape]
    wrong += [key for key in found if key not in wanted and key != _HEAD]
    return f"{len(wrong)} weights of {part[1]} differ, {wrong[0]} for example" if wrong else ""


def _converted(part: PartClass, settings: Config, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors under the names of diffusers or transformers; scales are left out."""
    tensors = {key: value for key, value in tensors.items() if not is_scale(key)}
    wanted = _wanted(part, json.dumps(settings))
    if part[0] == "diffusers":
        if wanted.keys() <= tensors.keys():
            return tensors  # diffusers' own names
        if part == QWEN_AUTOENCODER:  # Wan's autoencoder
            return converter("AutoencoderKLWan")(dict(tensors))
        ends = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
        renamed = {next((b + key[len(a) :] for a, b in ends.items() if key.startswith(a)), key): value for key, value in tensors.items()}
        found: dict[str, Any] = converter("AutoencoderKL")(dict(renamed), config=settings)
        return {**found, **{key: value for key, value in renamed.items() if key.startswith("bn.")}}
    bare = {_TEXT_PREFIX.sub("", key): value for key, value in tensors.items()}
    names = {_TEXT_PREFIX.sub("", key): key for key in wanted}
    if part == T5 and "shared.weight" in bare:
        bare["encoder.embed_tokens.weight"] = bare["shared.weight"]
    return {names.get(key, key): value for key, value in bare.items()}


def _empty(part: PartClass, settings: Config) -> Any:
    """A module without weights; tables that are computed keep their values."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}[part[0]], part[1])
    with init_empty_weights(include_buffers=False):
        return cls.from_config(settings) if part[0] == "diffusers" else cls(cls.config_class(**settings))
