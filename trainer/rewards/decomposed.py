"""LongAlign's decomposition of two-tower rewards: what a score says of any prompt, apart from what it says of this one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reward import check_lengths
from ..runtime.files import write_text
from .base import RewardModel
from .taste import may_be_tower
from .two_tower import TwoTower

Kept = Literal["relevant", "irrelevant"]
KEPT: tuple[Kept, ...] = ("relevant", "irrelevant")
OMEGA = 0.3
"""Official: the share of the common direction that stays."""
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")


def sentences(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text in its sentences, and one that the text tower would cut in pieces of whole words; a text without any is itself."""
    found: list[str] = []
    for sentence in filter(None, _SENTENCE.split(text.strip())):
        piece: list[str] = []
        for word in [sentence] if fits(sentence) else sentence.split():
            if piece and not fits(" ".join([*piece, word])):
                found.append(" ".join(piece))
                piece = []
            piece.append(word)
        found.append(" ".join(piece))
    return found or [text]


def common_direction(texts: Tensor) -> Tensor:
    """m̂ (D,) of unit text features (N,D): their mean, of length 1."""
    return F.normalize(texts.double().mean(0), dim=0).to(texts)


def damped(texts: Tensor, common: Tensor, omega: float) -> Tensor:
    """t' = t − (1 − ω)(t·m̂)m̂ of text features (…,D) and m̂ (D,); it is not normalised again."""
    return texts - (1 - omega) * (texts @ common)[..., None] * common


@dataclass(frozen=True)
class CommonText:
    """A file with the common text direction of a two-tower reward."""

    tower: str
    """As `registry.load` takes it."""
    tower_sha256: str
    omega: float
    segments: bool
    """Whether a prompt's score is the mean over its sentences."""
    prompts: int
    """That the direction is the mean of."""
    common: tuple[float, ...]
    """m̂ (D,)."""

    @staticmethod
    def of(tower: TwoTower, name: str, sha256: str, prompts: Sequence[str], omega: float, segments: bool) -> CommonText:
        """The direction of a list of prompts."""
        empty = Decomposed(tower, CommonText(name, sha256, omega, segments, len(prompts), ()), "relevant")
        return replace(empty.file, common=tuple(common_direction(empty.texts(prompts)).tolist()))

    def write(self, path: Path) -> None:
        """JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(asdict(self)) + "\n", path)

    @staticmethod
    def read(path: Path) -> CommonText:
        """Raises FileNotFoundError, or ValueError in one line for another file."""
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: make it with `python -m trainer rewards common`")
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            values["common"] = tuple(map(float, values["common"]))
            found = CommonText(**values)
            length = math.sqrt(sum(x * x for x in found.common))
            tower: tuple[Any, Any] = found.tower, found.tower_sha256
            if not all(isinstance(text, str) for text in tower) or not may_be_tower(found.tower):
                raise ValueError(f"its tower {str(found.tower)[:200]!r} is not a two-tower reward")
            if not abs(length - 1) < 1e-3 or not 0 <= found.omega <= 1:
                raise ValueError(f"its direction has the length {length:.3g}, and omega is {found.omega}")
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path} holds no common text direction ({why}): make it with `python -m trainer rewards common`") from error


class Decomposed(RewardModel):
    """scale·t'·v with t' = t − (1 − ω)(t·m̂)m̂ (`relevant`), or scale·m̂·v (`irrelevant`), of a two-tower reward's t and v.

    LongAlign (Liu et al. 2024, arXiv:2410.11817, section 3.3; official code: loss.py, ω = 0.3, m̂ of a batch, here of a file of prompts).
    What a score says of any prompt, such as style and contrast, lies along m̂ and is what training exploits. With `segments`
    t is the mean of its sentences' features, not normalised, so that the score is the mean of theirs (Denscore).
    """

    takes_prefixes = True
    common: Tensor

    def __init__(self, tower: TwoTower, file: CommonText, kept: Kept) -> None:
        super().__init__()
        self.tower, self.file, self.fit, self.needs_prompt = tower, file, tower.fit, kept == "relevant"
        self.supports_gradient_checkpointing = tower.supports_gradient_checkpointing
        self.register_buffer("common", torch.tensor(file.common), persistent=False)

    @staticmethod
    def load(path: Path, kept: Kept, tower_of: Callable[[str], RewardModel], hash_of: Callable[[str], str]) -> Decomposed:
        """Raises ValueError where the tower is another than the one that the direction was taken of."""
        file = CommonText.read(path)
        if (found := hash_of(file.tower)) != file.tower_sha256:
            raise ValueError(
                f"{path} is of {file.tower} of sha256 {file.tower_sha256[:12]}, which here is {found[:12]}: make it again here"
            )
        tower = tower_of(file.tower)
        if not isinstance(tower, TwoTower):
            raise ValueError(f"{path} names {file.tower}, which is not a two-tower reward")
        return Decomposed(tower, file, kept)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        return self.scores(images, prompts, [""])[:, 0]

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P): each image is encoded once."""
        check_lengths(images, prompts)
        seen = self.tower.image_features(images)
        common = self.common.to(seen)
        if not self.needs_prompt:
            return (self.tower.scale * seen @ common)[:, None].expand(-1, len(prefixes))
        texts = damped(self.texts([prefix + prompt for prompt in prompts for prefix in prefixes]).to(seen), common, self.file.omega)
        return self.tower.scale * torch.einsum("bd,bpd->bp", seen, texts.unflatten(0, (len(prompts), len(prefixes))))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """t (B,D) of B prompts."""
        parts = [self.parts(prompt) for prompt in prompts]
        found = self.tower.text_features([part for some in parts for part in some])
        return torch.stack([some.mean(0) for some in found.split([len(some) for some in parts])])

    def parts(self, prompt: str) -> list[str]:
        """What the text tower reads of a prompt: its sentences, or the whole."""
        return sentences(prompt, lambda text: self.tower.cut(text) == 0) if self.file.segments else [prompt]

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode the parts of these prompts now."""
        if self.needs_prompt:
            self.tower.remember([part for prompt in prompts for part in self.parts(prompt)])

    def place(self, device: str | torch.device, prompts: Sequence[str] | None = None) -> None:
        """See RewardModel; the text tower stays on the CPU where no prompt is read."""
        wanted = prompts if prompts is None else [part for prompt in prompts for part in self.parts(prompt)] if self.needs_prompt else []
        self.tower.place(device, wanted)
