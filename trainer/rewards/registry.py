"""The rewards by name: how each is loaded, under which licence, from where; and `load`, which every caller uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import ConfigError
from ..models.open import DTYPES
from ..reward import Reward
from .aesthetic import Aesthetic
from .clip import ARCHITECTURES, load_clip, tokenizer
from .compressibility import JpegSize
from .files import WeightFile, find, folders, verify
from .image_reward import ARCHITECTURE, MEAN, STD, ImageReward
from .mps import MPS, SAFE
from .preprocess import Fit
from .python_file import PythonReward
from .two_tower import TwoTower
from .weighted import Part, WeightedSum, parse_weights
from .weights import Held

Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Entry:
    """One reward: `make(paths, architecture, held)` loads it; `files` are what it needs, the first being its own."""

    make: Callable[[Paths, Mapping[str, Any], Held], Reward]
    architecture: Mapping[str, Any]
    files: Mapping[str, WeightFile]
    licence: str
    source: str
    mean: float | None = None
    std: float | None = None


def _tower(
    paths: Paths, architecture: Mapping[str, Any], held: Held, rule: Literal["crop", "pad"] = "crop", scaled: bool = False
) -> TwoTower:
    model = load_clip(paths["weights"], architecture, held)
    size = architecture["vision_cfg"]["image_size"]
    scale = float(model.logit_scale.exp()) if scaled else 1.0
    return TwoTower(model, tokenizer(architecture["text_cfg"]["context_length"]), size, scale, Fit(size, rule))


def _image_reward(paths: Paths, architecture: Mapping[str, Any], held: Held) -> ImageReward:
    return ImageReward.load(paths["weights"], paths["vocabulary"], architecture, held)


def _mps(paths: Paths, architecture: Mapping[str, Any], held: Held) -> MPS:
    return MPS.load(paths["weights"], tokenizer(architecture["text_cfg"]["context_length"]), architecture, held)


def _aesthetic(paths: Paths, architecture: Mapping[str, Any], held: Held) -> Aesthetic:
    return Aesthetic.load(_tower({"weights": paths["clip"]}, architecture, held), paths["weights"])


_OTHER_NAMES = ("model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_TABLE = "open_clip 3.3: pretrained.py, constants.py"


def _clip(name: str, file: WeightFile, licence: str, paper: str) -> Entry:
    return Entry(_tower, ARCHITECTURES[name], {"weights": file}, licence, paper)


def _hps_entry(file: str) -> Entry:
    safe = file.removesuffix(".pt") + ".safetensors"
    weights = WeightFile("xswu/HPSv2", file, also=(safe, "model.safetensors"), read_at="github.com/tgxs002/HPSv2: hpsv2/utils.py")
    return Entry(
        partial(_tower, rule="pad"),
        ARCHITECTURES["ViT-H-14"],
        {"weights": weights},
        "Apache-2.0 (card, code)",
        "arXiv:2306.09341, huggingface.co/xswu/HPSv2",
    )


_B32 = WeightFile(
    "timm/vit_base_patch32_clip_224.openai",
    "open_clip_model.safetensors",
    "ab5b8ef490e86faa07d3523926b842c765de1de5",
    _OTHER_NAMES,
    read_at="huggingface.co/timm/vit_base_patch32_clip_224.openai/tree/ab5b8ef490e86faa07d3523926b842c765de1de5",
)
_L14 = WeightFile(
    "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", also=_OTHER_NAMES, folder="clip-l14", read_at=_TABLE
)
_H14 = WeightFile("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_model.safetensors", also=_OTHER_NAMES, read_at=_TABLE)
_OPENAI = "arXiv:2103.00020, github.com/openai/CLIP"

# "card": the repository that holds the weights says so; "code": the authors' program does.
REWARDS: dict[str, Entry] = {
    "hpsv2.1": _hps_entry("HPS_v2.1_compressed.pt"),
    "hpsv2": _hps_entry("HPS_v2_compressed.pt"),
    "pickscore": Entry(
        partial(_tower, scaled=True),
        ARCHITECTURES["ViT-H-14"],
        {
            "weights": WeightFile(
                "yuvalkirstain/PickScore_v1",
                "model.safetensors",
                "a4e4367c6dfa7288a00c550414478f865b875800",
                ("PickScore_v1.safetensors", "pytorch_model.bin"),
                read_at="huggingface.co/yuvalkirstain/PickScore_v1/tree/a4e4367c6dfa7288a00c550414478f865b875800",
            )
        },
        "MIT (code; card: none)",
        "arXiv:2305.01569, huggingface.co/yuvalkirstain/PickScore_v1",
    ),
    "clip": _clip("ViT-B-32", _B32, "Apache-2.0 (card)", _OPENAI),
    "clip-l14": _clip("ViT-L-14", _L14, "Apache-2.0 (card)", _OPENAI),
    "clip-h14": _clip("ViT-H-14", _H14, "MIT (code)", "arXiv:2212.07143, github.com/mlfoundations/open_clip"),
    "imagereward": Entry(
        _image_reward,
        ARCHITECTURE,
        {
            "weights": WeightFile(
                "THUDM/ImageReward",
                "ImageReward.pt",
                "c63dec8373b5c3728b1d250865c402c9546be210",
                ("ImageReward.safetensors", "model.safetensors"),
                read_at="huggingface.co/THUDM/ImageReward/tree/c63dec8373b5c3728b1d250865c402c9546be210",
            ),
            "vocabulary": WeightFile(
                "google-bert/bert-base-uncased",
                "vocab.txt",
                "1a30f9711976fc1bd9879517ef1075cd161924fa",
                ("bert-base-uncased-vocab.txt",),
                read_at="huggingface.co/google-bert/bert-base-uncased/tree/1a30f9711976fc1bd9879517ef1075cd161924fa",
            ),
        },
        "Apache-2.0 (card, code)",
        "arXiv:2304.05977, huggingface.co/THUDM/ImageReward",
        MEAN,
        STD,
    ),
    "mps": Entry(
        _mps,
        ARCHITECTURES["ViT-H-14"],
        {
            "weights": WeightFile(
                "RE-N-Y/mpsv1",
                "model.safetensors",
                also=("MPS_overall_checkpoint_diffsynth.safetensors", "MPS_overall_checkpoint.pth"),
                read_at="huggingface.co/RE-N-Y/mpsv1/tree/main",
            )
        },
        "MIT (code; card: none)",
        f"arXiv:2405.14705, github.com/Kwai-Kolors/MPS; {SAFE}",
    ),
    "aesthetic": Entry(
        _aesthetic,
        ARCHITECTURES["ViT-L-14"],
        {
            "weights": WeightFile(
                "trl-lib/ddpo-aesthetic-predictor",
                "aesthetic-model.pth",
                "7f639699bec8126062148a47ecb1a4312d8e6688",
                ("sac+logos+ava1-l14-linearMSE.safetensors", "sac+logos+ava1-l14-linearMSE.pth"),
                read_at="huggingface.co/trl-lib/ddpo-aesthetic-predictor/tree/7f639699bec8126062148a47ecb1a4312d8e6688",
            ),
            "clip": _L14,
        },
        "Apache-2.0 (code; card: none)",
        "github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
    "compressibility": Entry(lambda *_: JpegSize(-1), {}, {}, "none needed", "arXiv:2305.13301"),
    "incompressibility": Entry(lambda *_: JpegSize(1), {}, {}, "none needed", "arXiv:2305.13301"),
}


@dataclass(frozen=True)
class Places:
    """Where weights and statistics are looked for, best first."""

    folders: Sequence[Path] = field(default_factory=folders)

    def statistics(self, name_or_path: str) -> Path:
        """Where the measured mean and standard deviation of a reward lie: in its folder, or beside a user's own file."""
        name, at, file = name_or_path.partition("@")
        if Path(name_or_path).is_dir():
            return Path(name_or_path) / "statistics.json"
        if at or name.endswith(".py"):
            return Path(file or name).with_suffix(".statistics.json")
        if name not in REWARDS:
            raise ValueError(f"{name} is no reward whose statistics can be kept: use {', '.join(REWARDS)}, a file or a folder")
        kept = [folder / name / "statistics.json" for folder in self.folders]
        return next((path for path in kept if path.is_file()), kept[0])

    def read_statistics(self, name_or_path: str) -> tuple[float, float] | None:
        """Mean and standard deviation of a reward on its user's images, where they were measured."""
        path = self.statistics(name_or_path)
        if not path.is_file():
            return None
        values = json.loads(path.read_text("utf-8"))
        return values["mean"], values["std"]


def load(
    name_or_path: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    places: Places | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> Part:
    """A reward with its statistics: a name of REWARDS, `NAME@FILE` with weights of one's own, a reward folder, or a Python file.

    Nothing is fetched. `architecture` replaces the entry's, for models of another size in the same layout. On the meta device
    a named reward needs no file.
    """
    places = places or Places()
    name, at, file = name_or_path.partition("@")
    if name in REWARDS and (at or not Path(name).is_dir()):
        entry = REWARDS[name]
        held = Held(device, dtype)
        paths = locate(name, places, Path(file) if at else None) if held.valued else {role: Path(f.name) for role, f in entry.files.items()}
        with torch.inference_mode(False):  # weights made inside a ComfyUI prompt would be inference tensors, which no graph may save
            reward = entry.make(paths, architecture or entry.architecture, held)
        return Part(name_or_path, reward, 1.0, *(places.read_statistics(name_or_path) or (entry.mean, entry.std)))
    if name_or_path.endswith(".py"):
        return Part(name_or_path, PythonReward.load(Path(name_or_path)), 1.0, *(places.read_statistics(name_or_path) or (None, None)))
    if Path(name_or_path).is_dir():
        tower, config = TwoTower.load(Path(name_or_path), device, dtype)
        return Part(name_or_path, tower, 1.0, *(places.read_statistics(name_or_path) or (config["mean"], config["std"])))
    raise ValueError(f"unknown reward {name_or_path!r}: use {', '.join(REWARDS)}, NAME@FILE, a reward folder, or a Python file")


def locate(name: str, places: Places, weights: Path | None = None) -> dict[str, Path]:
    """Where each file of a reward is, verified; `weights` stands for the first. A missing one is an error that says how to get it."""
    found: dict[str, Path] = {}
    beside = [weights.parent] if weights else []
    for role, file in REWARDS[name].files.items():
        if weights is not None and role == "weights":
            found[role] = verify(weights)
            continue
        path = next((p for p in (b / n for b in beside for n in (file.name, *file.also)) if p.is_file()), None)
        path = path or find(name, file, places.folders)
        if path is None:
            raise FileNotFoundError(
                f"{name} needs {file.name}: run `python -m trainer rewards download {name}`, "
                f"or put it into {places.folders[0] / name} ({file.path} of {file.repository})"
            )
        found[role] = verify(path)
    return found


EMBEDDED = Path(__file__).parents[1] / "demo" / "weights"
DEMO_REWARDS = ("demo-proxy", "demo-heldout", "demo-gold")


def open_reward(name: str, device: str = "cpu", dtype: str = "float32") -> Part:
    """As `load`, by the name of a dtype; also the embedded model's rewards, DEMO_REWARDS."""
    if dtype not in DTYPES:
        raise ConfigError(f"reward_dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if name == "demo-gold":
        gold = import_module("trainer.demo.files").load_gold(device)  # by name: rewards know nothing of the demo's code
        return Part(name, gold, mean=0.0, std=1.0, size=64)  # the gold reward defines its own scale
    if name in DEMO_REWARDS:
        tower, config = TwoTower.load(EMBEDDED / name.removeprefix("demo-"), device, DTYPES[dtype])
        return Part(name, tower, 1.0, config["mean"], config["std"])
    try:
        return load(name, device, DTYPES[dtype])
    except ValueError as error:
        hint = f" (the embedded model's are {', '.join(DEMO_REWARDS)})" if str(error).startswith("unknown reward") else ""
        raise ConfigError(f"{error}{hint}") from error


def load_reward(spec: str, standardise: bool, device: str = "cpu", dtype: str = "float32") -> Reward:
    """A reward, or a weighted sum of several: `hpsv2.1`, or `hpsv2.1=1, pickscore=0.5`."""
    parts = [replace(open_reward(name, device, dtype), weight=weight) for name, weight in parse_weights(spec)]
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].standardised if standardise else parts[0].reward
    return WeightedSum(parts, raw=not standardise)
