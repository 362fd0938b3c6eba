"""A person's taste as a reward: a linear head on a two-tower reward, fitted by `trainer.taste`, and its file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..reward import check_lengths
from ..runtime.files import replacing
from .base import RewardModel
from .judge_client import is_url
from .two_tower import TwoTower

log = logging.getLogger(__name__)

KEY, VERSION = "imagerefl_taste", 1
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TasteFile:
    """A fitted head, r = baseline·s + image·f(x) + product·(f(x)∘g(t)), and what it was fitted on (`trainer.taste.head`)."""

    baseline: float
    image: Tensor
    """(D,)"""
    product: Tensor
    """(D,)"""
    tower: str
    """The two-tower reward, as `registry.load` takes it."""
    tower_sha256: str
    mean: float
    """Of the head's own scores over the images that were judged, and their standard deviation."""
    std: float
    choices: int
    agreement: tuple[float, float, float] | None
    """Cross-validated, and the ends of its 95 % interval; None where it could not be measured."""
    precision: float
    """λ of the prior; infinity: the reward without a head."""
    person: str = ""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further figures of the report."""

    @property
    def weak(self) -> str:
        """Why it should not be trained on, in one line; empty where it may."""
        if self.agreement is None:
            return "how often this taste predicts a choice is not known: do not train on it"
        value, low, _ = self.agreement
        return f"this taste predicts {value:.2f} of the choices, which may be chance ({low:.2f}): do not train on it" if low <= 0.5 else ""

    def write(self, path: Path) -> None:
        """Tensors and one key of metadata, JSON; equal heads give equal bytes."""
        described = {name: value for name, value in asdict(self).items() if name not in ("image", "product")}
        described |= {"version": VERSION, "precision": "inf" if math.isinf(self.precision) else self.precision}
        tensors = {"image": self.image.float().contiguous(), "product": self.product.float().contiguous()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(save(tensors, {KEY: json.dumps(described)}))

    def _check(self) -> None:
        """ValueError where the values cannot be those of a fit."""
        width = self.image.shape
        if len(width) != 1 or self.product.shape != width or not bool(self.image.isfinite().all() and self.product.isfinite().all()):
            raise ValueError("its head is not two finite vectors of one length")
        if not all(map(math.isfinite, (self.baseline, self.mean, self.std))) or self.std <= 0:
            raise ValueError("baseline, mean and std are not finite numbers with std above 0")
        tower: tuple[Any, Any] = self.tower, self.tower_sha256
        if not all(isinstance(text, str) for text in tower) or not may_be_tower(self.tower):
            raise ValueError(f"its tower {str(self.tower)[:200]!r} is not a two-tower reward")
        value, low, high = self.agreement or (0.5, 0.5, 0.5)
        if not 0 <= low <= value <= high <= 1 or math.isnan(self.precision) or self.precision < 0:
            raise ValueError("its agreement or precision is out of range")

    @staticmethod
    def read(path: Path) -> TasteFile:
        """Raises FileNotFoundError, or ValueError in one line for another file."""
        if not path.is_file():
            raise FileNotFoundError(f"no taste file {path}")
        try:
            with safe_open(path, "pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
                if text is None:
                    raise ValueError("it is another safetensors file")
                described: dict[str, Any] = json.loads(text)
                tensors = {name: opened.get_tensor(name).float() for name in ("image", "product")}
            version = described.pop("version")
            if version != VERSION:
                raise ValueError(f"its version is {version}, this program reads {VERSION}: update it")
            agreement = described.pop("agreement")
            described["precision"] = float(described["precision"])
            known = {f.name for f in fields(TasteFile)}
            values: dict[str, Any] = {name: value for name, value in described.items() if name in known}
            value, low, high = agreement or (0.0, 0.0, 0.0)
            found = TasteFile(**tensors, **values, agreement=(value, low, high) if agreement else None)
            found._check()
            return found
        except Exception as error:  # safetensors raises errors of its own
            raise ValueError(f"{path} is not a taste: {' '.join(str(error).split())}; fit one with `python -m trainer taste`") from error


def taste_file(name_or_path: str) -> Path | None:
    """The file of `taste@FILE`, or of a safetensors file that is named as a reward; None of other names."""
    name, _, file = name_or_path.partition("@")
    if name == "taste":
        if not file:
            raise ValueError("taste needs the file of a fitted taste: write taste@FILE; `python -m trainer taste` makes it")
        return Path(file)
    return Path(name_or_path) if "@" not in name_or_path and name_or_path.endswith(SUFFIX) else None


def may_be_tower(name: str) -> bool:
    """Whether a name in a file, which may come from anywhere, can be that of weights: no program, no judge, nothing made of a tower."""
    kind, at, _ = name.partition("@")
    made = kind in ("taste", "relevant", "irrelevant") or (not at and name.endswith(SUFFIX))
    return not (is_url(name) or name.lower().endswith(".py") or made)


class TasteReward(RewardModel):
    """A two-tower reward with a person's head: differentiable, in logits of a choice between two images of one prompt."""

    takes_prefixes = True
    image: Tensor
    product: Tensor

    def __init__(self, tower: TwoTower, head: TasteFile) -> None:
        super().__init__()
        self.tower, self.head, self.fit = tower, head, tower.fit
        self.supports_gradient_checkpointing = tower.supports_gradient_checkpointing
        self.statistics = (head.mean, head.std)
        self.register_buffer("image", head.image, persistent=False)
        self.register_buffer("product", head.product, persistent=False)

    @staticmethod
    def load(path: Path, tower_of: Callable[[str], RewardModel], hash_of: Callable[[str], str]) -> TasteReward:
        """Raises ValueError where the tower is another than the one it was fitted on."""
        head = TasteFile.read(path)
        try:
            found = hash_of(head.tower)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} was fitted on {head.tower}, which is not here ({error.strerror or error}): put it there, or fit again here"
            ) from error
        if found != head.tower_sha256:
            raise ValueError(
                f"{path} was fitted on {head.tower} of sha256 {head.tower_sha256[:12]}, which here is {found[:12]}: fit it again here"
            )
        tower = tower_of(head.tower)
        if not isinstance(tower, TwoTower):
            raise ValueError(f"{path} names {head.tower}, which is not a two-tower reward")
        if head.weak:
            log.warning("%s: %s", path.name, head.weak)
        return TasteReward(tower, head)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        check_lengths(images, prompts)
        seen, texts = self.tower.image_features(images), self.tower.text_features(prompts)
        return seen @ self.image.to(seen) + self._met(seen, texts)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P): each image is encoded once."""
        check_lengths(images, prompts)
        seen = self.tower.image_features(images)
        texts = self.tower.text_features([prefix + prompt for prompt in prompts for prefix in prefixes])
        texts = texts.unflatten(0, (len(prompts), len(prefixes)))
        return (seen @ self.image.to(seen))[:, None] + self._met(seen[:, None], texts)

    def _met(self, seen: Tensor, texts: Tensor) -> Tensor:
        """baseline·s + product·(f∘g) of features (…,D)."""
        return (seen * texts * (self.head.baseline * self.tower.scale + self.product.to(seen))).sum(-1)
