"""The rewards by name: how each is loaded, its licence and source; and `load`, the one way to open a reward."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..runtime.files import files_hash
from . import sources
from .aesthetic import Aesthetic
from .base import RewardModel
from .calibrate import StatisticsError, checked_statistics
from .clip import ARCHITECTURES, load_clip, temperature, tokenizer
from .compressibility import JpegSize
from .decomposed import KEPT, CommonText, Decomposed
from .files import WeightFile, find, verify, weight_folders
from .high_preference import HighPreference
from .http_judge import HttpJudge, capabilities_of, folder_of
from .image_reward import ARCHITECTURE, ImageReward
from .judge_client import is_url
from .mps import MPS, SAFE
from .preprocess import Fit
from .python_file import PythonReward
from .taste import TasteFile, TasteReward, taste_file
from .two_tower import FILES as FOLDER_FILES
from .two_tower import TwoTower
from .weighted import RewardSpec, WeightedSum, parse_weights
from .weights import Placement

Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Entry:
    """One reward: `make(paths, architecture, placement)` loads it from `files`, both by role; the role `weights` is its own file."""

    make: Callable[[Paths, Mapping[str, Any], Placement], RewardModel]
    licence: str
    source: str
    files: Mapping[str, WeightFile] = field(default_factory=dict[str, WeightFile])
    architecture: Mapping[str, Any] = field(default_factory=dict[str, Any])
    embedded: bool = False
    """Whether weights and statistics are part of this package."""


def _two_tower(
    paths: Paths,
    architecture: Mapping[str, Any],
    placement: Placement,
    rule: Literal["crop", "pad"] = "crop",
    scaled: bool = False,
    repair: bool = True,
) -> TwoTower:
    clip = load_clip(paths["weights"], architecture, placement)
    fit = Fit(architecture["vision_cfg"]["image_size"], rule)
    return TwoTower(clip, tokenizer(architecture["text_cfg"]["context_length"], repair), fit, temperature(clip) if scaled else 1.0)


def _clip(name: str, file: WeightFile, licence: str, source: str, **options: Any) -> Entry:
    return Entry(partial(_two_tower, **options), licence, source, {"weights": file}, ARCHITECTURES[name])


def _hps(file: str) -> Entry:
    names = (file.removesuffix(".pt") + ".safetensors", "model.safetensors")
    weights = WeightFile("xswu/HPSv2", file, also=names, named_in="github.com/tgxs002/HPSv2: hpsv2/utils.py")
    return _clip("ViT-H-14", weights, "Apache-2.0 (card, code)", "arXiv:2306.09341, huggingface.co/xswu/HPSv2", rule="pad")


def _demo(name: str) -> Entry:
    def make(paths: Paths, architecture: Mapping[str, Any], placement: Placement) -> RewardModel:
        files = importlib.import_module("..demo.files", __package__)  # rewards/ must not depend on demo/
        return files.load_raw_reward(name, placement.device, placement.dtype)

    return Entry(make, "Apache-2.0 (this package)", "the demo's 64×64 images", embedded=True)


def _mps(threshold: float) -> Entry:
    source = f"arXiv:2405.14705, github.com/Kwai-Kolors/MPS; {SAFE}"
    return Entry(
        partial(MPS.load, threshold=threshold), "MIT (code; card: none)", source, {"weights": sources.MPS}, ARCHITECTURES["ViT-H-14"]
    )


# Licences: "card" is what the repository of the weights says, "code" what the authors' code says.
REWARDS: dict[str, Entry] = {
    "demo-proxy": _demo("proxy"),
    "demo-heldout": _demo("heldout"),
    "demo-gold": _demo("gold"),
    "hpsv2.1": _hps("HPS_v2.1_compressed.pt"),
    "hpsv2": _hps("HPS_v2_compressed.pt"),
    "pickscore": _clip(
        "ViT-H-14",
        sources.PICKSCORE,
        "MIT (code; card: none)",
        "arXiv:2305.01569, huggingface.co/yuvalkirstain/PickScore_v1",
        scaled=True,
        repair=False,
    ),
    "clip": _clip("ViT-B-32", sources.B32, "Apache-2.0 (card)", "arXiv:2103.00020, github.com/openai/CLIP"),
    "clip-l14": _clip("ViT-L-14", sources.L14, "Apache-2.0 (card)", "arXiv:2103.00020, github.com/openai/CLIP"),
    "clip-h14": _clip("ViT-H-14", sources.H14, "MIT (code)", "arXiv:2212.07143, github.com/mlfoundations/open_clip"),
    "imagereward": Entry(
        ImageReward.load,
        "Apache-2.0 (card, code)",
        "arXiv:2304.05977, huggingface.co/THUDM/ImageReward",
        {"weights": sources.IMAGE_REWARD, "vocabulary": sources.VOCABULARY},
        ARCHITECTURE,
    ),
    "mps": _mps(0.3),
    "mps-0.01": _mps(0.01),  # the threshold of the authors' model class and of ImageReFL's code
    "aesthetic": Entry(
        Aesthetic.load,
        "Apache-2.0 (code; card: none)",
        "github.com/christophschuhmann/improved-aesthetic-predictor",
        {"weights": sources.AESTHETIC, "clip": sources.L14},
        ARCHITECTURES["ViT-L-14"],
    ),
    "ict": _clip("ViT-H-14", sources.ICT, "MIT (code; card: not read)", "arXiv:2507.19002, github.com/BarretBa/ICTHP"),
    "hp": Entry(
        HighPreference.load,
        "MIT (code; card: not read)",
        "arXiv:2507.19002, github.com/BarretBa/ICTHP",
        {"weights": sources.HP, "backbone": sources.HP_BACKBONE},
        ARCHITECTURES["ViT-H-14"],
    ),
    "compressibility": Entry(lambda *_: JpegSize(-1), "none needed", "arXiv:2305.13301"),
    "incompressibility": Entry(lambda *_: JpegSize(1), "none needed", "arXiv:2305.13301"),
}


@dataclass(frozen=True)
class WeightFolders:
    """Folders that hold weights and measured statistics; the first one that has a file wins."""

    folders: Sequence[Path] = field(default_factory=weight_folders)

    def statistics(self, name_or_path: str) -> Path:
        """The file with a reward's measured mean and standard deviation: in its folder, or beside a user's own file."""
        if is_url(name_or_path):
            return folder_of(name_or_path, capabilities_of(name_or_path)) / "statistics.json"
        name, at, file = name_or_path.partition("@")
        if Path(name_or_path).is_dir():
            return Path(name_or_path) / "statistics.json"
        if name not in REWARDS and name_or_path.endswith((".py", ".safetensors")):
            return Path(file or name_or_path).with_suffix(".statistics.json")
        if at:
            return Path(file).with_suffix(f".{name}.statistics.json" if name in KEPT else ".statistics.json")
        if name not in REWARDS or REWARDS[name].embedded:
            known = ", ".join(n for n, entry in REWARDS.items() if not entry.embedded)
            raise ValueError(f"statistics of {name} cannot be stored: use {known}, a file or a folder")
        stored = [folder / name / "statistics.json" for folder in self.folders]
        return next((path for path in stored if path.is_file()), stored[0])

    def read_statistics(self, name_or_path: str) -> tuple[float, float] | None:
        """The measured mean and standard deviation of a reward; None where there are none."""
        if name_or_path in REWARDS and REWARDS[name_or_path].embedded:
            return None
        path = self.statistics(name_or_path)
        if not path.is_file():
            return None
        try:
            return checked_statistics(json.loads(path.read_text("utf-8-sig")))
        except (ValueError, RecursionError) as error:  # broken JSON is a ValueError
            why = f" ({error})" if isinstance(error, StatisticsError) else ""
            raise ValueError(
                f"{path} does not hold a mean and a standard deviation above 0{why}: measure again with `rewards calibrate`, or delete it"
            ) from error


def load(
    name_or_path: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    folders: WeightFolders | None = None,
    architecture: Mapping[str, Any] | None = None,
    allow_remote: bool = False,
) -> RewardSpec:
    """A reward with its statistics: a name of REWARDS, `NAME@FILE` with weights of one's own, a reward folder, a Python file,
    `taste@FILE`, a fitted taste, `relevant@FILE` and `irrelevant@FILE`, parts of a two-tower reward, or the URL of a judge, which is
    asked what it is; one on another machine only where that is allowed.

    Nothing is downloaded. `architecture` replaces the entry's, for models of another size in the same layout. On the meta device
    a named reward needs no file.
    """
    folders = folders or WeightFolders()
    if is_url(name_or_path):
        reward = HttpJudge.connect(name_or_path, allow_remote)
    else:
        reward = _open(name_or_path, Placement(device, dtype), folders, architecture)
    mean, reward.std = folders.read_statistics(name_or_path) or reward.statistics or (None, None)
    return RewardSpec(name_or_path, reward, 1.0, mean, reward.std)


def load_reward(
    spec: str,
    standardise: bool,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_remote: bool = False,
) -> RewardModel:
    """A reward, or a weighted sum of several: `hpsv2.1`, or `hpsv2.1=1, pickscore=0.5`."""
    parts = parse_weights(spec)
    specs = [replace(load(name, device, dtype, allow_remote=allow_remote), weight=weight) for name, weight in parts]
    if len(specs) == 1 and specs[0].weight == 1:
        return specs[0].standardised if standardise else specs[0].reward
    return WeightedSum(specs, raw=not standardise)


def load_features(name: str, device: str | torch.device = "cpu") -> TwoTower:
    """The two-tower reward whose features a black-box objective's surrogate reads."""
    reward = load(name, device).reward
    if not isinstance(reward, TwoTower):
        raise ValueError(f"features = {name}: only a two-tower reward has features of images and texts")
    return reward


def weights_hashes(spec: str | Sequence[str], folders: WeightFolders | None = None, allow_remote: bool = False) -> dict[str, str]:
    """By name, SHA-256 of the files that the scores of each reward of a sum depend on (`files_hash`); those without files are left out.

    Of a judge, SHA-256 of its name and version.
    """
    folders = folders or WeightFolders()
    names = [name for name, _ in parse_weights(spec)]
    hashes = {name: capabilities_of(name, allow_remote).digest if is_url(name) else files_hash(_files(name, folders)) for name in names}
    return {name: value for name, value in hashes.items() if value}


def _files(name_or_path: str, folders: WeightFolders) -> list[Path]:
    name, at, file = name_or_path.partition("@")
    if name in REWARDS and (at or not Path(name).is_dir()):
        if REWARDS[name].embedded:
            return importlib.import_module("..demo.files", __package__).reward_files(name.removeprefix("demo-"))
        return list(locate(name, folders, Path(file) if at else None).values())
    if name_or_path.endswith(".py"):
        return [Path(name_or_path)]
    if name in KEPT:
        return [Path(file), *_files(CommonText.read(Path(file)).tower, folders)]
    if (taste := taste_file(name_or_path)) is not None:
        return [taste, *_files(TasteFile.read(taste).tower, folders)]
    return [Path(name_or_path) / file for file in FOLDER_FILES]


def tower_hash(name: str, folders: WeightFolders | None = None) -> str:
    """SHA-256 of the files of the two-tower reward that a taste is fitted on."""
    return files_hash(_files(name, folders or WeightFolders()))


def _open(name_or_path: str, placement: Placement, folders: WeightFolders, architecture: Mapping[str, Any] | None) -> RewardModel:
    name, at, file = name_or_path.partition("@")
    if name in REWARDS and (at or not Path(name).is_dir()):
        entry = REWARDS[name]
        if at and "weights" not in entry.files:
            raise ValueError(f"{name_or_path}: {name} takes no weight file of one's own")
        if placement.is_meta:
            paths = {role: Path(f.name) for role, f in entry.files.items()}
        else:
            paths = locate(name, folders, Path(file) if at else None)
        with torch.inference_mode(False):  # in a ComfyUI prompt weights would be inference tensors, which autograd cannot save
            return entry.make(paths, architecture or entry.architecture, placement)
    if name_or_path.endswith(".py"):
        return PythonReward.load(Path(name_or_path))
    opened, hashed = lambda tower: _open(tower, placement, folders, None), lambda tower: tower_hash(tower, folders)
    if name in KEPT:
        if not file:
            raise ValueError(f"{name} needs a file: write {name}@FILE; `python -m trainer rewards common` makes it")
        return Decomposed.load(Path(file), name, opened, hashed)
    if (taste := taste_file(name_or_path)) is not None:
        return TasteReward.load(taste, opened, hashed)
    if Path(name_or_path).is_dir():
        return TwoTower.load(Path(name_or_path), placement.device, placement.dtype)
    own = "NAME@FILE, taste@FILE, relevant@FILE, irrelevant@FILE, a reward folder, a Python file, or a judge's URL"
    raise ValueError(f"unknown reward {name_or_path!r}: use {', '.join(REWARDS)}, {own}")


def locate(name: str, folders: WeightFolders, weights: Path | None = None) -> dict[str, Path]:
    """Role -> verified path of each file of a reward; `weights` replaces the file of that role.

    Raises FileNotFoundError with the command that downloads a missing file.
    """
    found: dict[str, Path] = {}
    for role, file in REWARDS[name].files.items():
        if weights is not None and role == "weights":
            found[role] = verify(weights)
            continue
        beside = [weights.parent / n for n in (file.name, *file.also)] if weights else []
        path = next((p for p in beside if p.is_file()), None) or find(name, file, folders.folders)
        if path is None:
            raise FileNotFoundError(
                f"{name} needs {file.name}: run `python -m trainer rewards download {name}`, "
                f"or put it into {folders.folders[0] / name} ({file.path} of {file.repository})"
            )
        found[role] = verify(path)
    return found
