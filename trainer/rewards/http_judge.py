"""A reward that runs in an environment of its own and is asked over HTTP; docs/judges.md has the protocol."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ..data.images import to_pil
from ..reward import RewardUnavailable, check_lengths
from .base import RewardModel
from .calibrate import StatisticsError, checked_statistics
from .judge_client import Endpoint, one_line
from .score_cache import ScoreCache

PROTOCOL = 1
SECONDS, MOST_SECONDS = 60.0, 600.0  # that a batch may take
BATCH, MOST_BATCH = 16, 256
MOST_UPLOAD = 64 << 20  # bytes of PNG per request; a larger image goes alone
_GREATEST = 3.4e38  # of float32


@dataclass(frozen=True)
class Limits:
    """Of asking: `seconds` per try (0: what the judge says, or a minute), tries after the first, and `pause` s before the second, doubled
    before each other one."""

    seconds: float = 0.0
    retries: int = 3
    pause: float = 1.0


LIMITS = Limits()


@dataclass(frozen=True)
class Capabilities:
    """What a judge says of itself at GET /health."""

    name: str
    version: str
    needs_prompt: bool = True
    batch: int = BATCH
    seconds: float = SECONDS
    statistics: tuple[float, float] | None = None

    @property
    def digest(self) -> str:
        """What tells the scores of two judges apart, as SHA-256 does for weights."""
        return hashlib.sha256(json.dumps([PROTOCOL, self.name, self.version]).encode()).hexdigest()

    @staticmethod
    def parse(answer: Any, url: str) -> Capabilities:
        """From the JSON of /health; RewardUnavailable names the key that is missing or wrong."""

        def refuse(why: str) -> NoReturn:
            raise RewardUnavailable(f"judge {url}/health: {why}; docs/judges.md has the form")

        if not isinstance(answer, dict):
            refuse("the answer is not a JSON object")
        values = cast(dict[str, Any], answer)
        _check_protocol(values, refuse)
        names = [values.get(key) for key in ("name", "version")]
        for key, value in zip(("name", "version"), names):
            if not isinstance(value, str) or not value.strip() or one_line(value) != value:
                refuse(f"{key} is not a short text")
        prompt, batch, seconds = values.get("needs_prompt", True), values.get("max_batch", BATCH), values.get("seconds", SECONDS)
        if not isinstance(prompt, bool):
            refuse("needs_prompt is neither true nor false")
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            refuse("max_batch is not a whole number of at least 1")
        if not _is_number(seconds) or seconds <= 0:
            refuse("seconds is not a number above 0")
        try:
            statistics = checked_statistics(values) if "mean" in values or "std" in values else None
        except StatisticsError as error:
            refuse(str(error))
        limited = min(batch, MOST_BATCH), float(min(seconds, MOST_SECONDS))
        return Capabilities(str(names[0]), str(names[1]), prompt, *limited, statistics)


class HttpJudge(RewardModel):
    """Scores that a program behind a URL gives. Images are sent as 8-bit PNG, so that no gradient reaches the pixels."""

    differentiable = False
    external = True

    def __init__(self, endpoint: Endpoint, capabilities: Capabilities, limits: Limits, waiting: Callable[[], None]) -> None:
        """`waiting` is called while an answer is waited for, and may raise."""
        super().__init__()
        self.endpoint, self.capabilities, self.limits, self.waiting = endpoint, capabilities, limits, waiting
        self.needs_prompt, self.statistics = capabilities.needs_prompt, capabilities.statistics
        self.cache = ScoreCache(folder_of(endpoint.url, capabilities) / "scores.sqlite")

    @staticmethod
    def connect(
        url: str, allow_remote: bool = False, limits: Limits | None = None, waiting: Callable[[], None] = lambda: None
    ) -> HttpJudge:
        """Ask the judge what it is. RewardUnavailable where it does not answer, or is another machine and that is not allowed."""
        endpoint, limits = Endpoint.parse(url, allow_remote), limits or LIMITS
        answer = endpoint.ask("/health", None, limits.seconds or SECONDS, limits.retries, limits.pause, waiting)
        capabilities = _KNOWN[endpoint.url] = Capabilities.parse(answer, endpoint.url)
        return HttpJudge(endpoint, capabilities, replace(limits, seconds=limits.seconds or capabilities.seconds), waiting)

    @property
    def digest(self) -> str:
        """Of the judge's name and version."""
        return self.capabilities.digest

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32, from the cache where they are known."""
        check_lengths(images, prompts)
        if not bool(images.isfinite().all()):
            raise ValueError("an image has pixels that are not finite: it was not sent to the judge")
        texts = list(prompts) if self.needs_prompt else [""] * len(prompts)
        pixels = (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        keys = [key_of(image, text) for image, text in zip(pixels, texts)]
        known = self.cache.read(list(dict.fromkeys(keys)))
        missing = {key: i for i, key in enumerate(keys) if key not in known}
        waiting, size = list[tuple[str, str, bytes]](), 0
        for key, i in missing.items():
            data = _png(images[i])
            if waiting and (len(waiting) == self.capabilities.batch or size + len(data) > MOST_UPLOAD):
                known |= self._ask(waiting)
                waiting, size = [], 0
            waiting.append((key, texts[i], data))
            size += len(data)
        if waiting:
            known |= self._ask(waiting)
        return torch.tensor([known[key] for key in keys], dtype=torch.float32, device=images.device)

    def _ask(self, items: Sequence[tuple[str, str, bytes]]) -> dict[str, float]:
        """Scores by key of a batch of (key, prompt, PNG), which are kept in the cache."""
        sent = [{"id": key, "prompt": text, "image": base64.b64encode(data).decode("ascii")} for key, text, data in items]
        limits = self.limits
        content = {"protocol": PROTOCOL, "items": sent}
        answer = self.endpoint.ask("/score", content, limits.seconds, limits.retries, limits.pause, self.waiting)
        scores = self._checked(answer, [key for key, _, _ in items])
        self.cache.write(scores)
        return scores

    def _checked(self, answer: Any, keys: Sequence[str]) -> dict[str, float]:
        """The scores of an answer; RewardUnavailable where they are not one number for each image, in their order, of this judge."""

        def refuse(why: str) -> NoReturn:
            raise RewardUnavailable(f"judge {self.endpoint.url}/score: {why}; nothing of the answer was used")

        if not isinstance(answer, dict):
            refuse("the answer is not a JSON object")
        values = cast(dict[str, Any], answer)
        _check_protocol(values, refuse)
        mine, theirs = self.capabilities, (values.get("name"), values.get("version"))
        if theirs != (mine.name, mine.version):
            said = " ".join(one_line(str(value)) for value in theirs)
            refuse(
                f"{said} answers, and {mine.name} {mine.version} was asked: scores of two judges are not mixed; begin anew with the other"
            )
        rows: Any = values.get("scores")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in cast(list[Any], rows)):
            refuse("scores is not a list of objects")
        listed = cast(list[dict[str, Any]], rows)
        if len(listed) != len(keys):
            refuse(f"{len(listed)} scores for {len(keys)} images")
        ids = [row.get("id") for row in listed]
        if ids != list(keys):
            same = all(isinstance(one, str) for one in ids) and sorted(cast(list[str], ids)) == sorted(keys)
            refuse("the scores are in another order than the images" if same else "a score is of another image than was sent")
        for number, row in enumerate(listed):
            value: Any = row.get("score")
            if not _is_number(value) or abs(value) > _GREATEST:
                refuse(f"score {number} is {one_line(repr(value)[:50])}, not a finite number")
        return {key: float(row["score"]) for key, row in zip(keys, listed)}


_KNOWN: dict[str, Capabilities] = {}
"""By URL, what each judge that this process has asked said of itself last."""


def capabilities_of(url: str, allow_remote: bool = False) -> Capabilities:
    """Of a judge, which is asked where this process has not yet."""
    known = _KNOWN.get(url.rstrip("/"))
    return known if known is not None else HttpJudge.connect(url, allow_remote).capabilities


def folder_of(url: str, capabilities: Capabilities) -> Path:
    """Where the scores of a judge, and what was measured of them, are kept."""
    name = hashlib.sha256(json.dumps([url.rstrip("/"), capabilities.digest]).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "imagerefl" / "judges" / name


def key_of(pixels: Tensor, prompt: str) -> str:
    """SHA-256 of an image (3,H,W) of bytes and its prompt: the id under which it is sent, and by which its score is kept."""
    digest = hashlib.sha256(f"{pixels.shape[1]} {pixels.shape[2]} ".encode())
    digest.update(pixels.permute(1, 2, 0).contiguous().numpy().tobytes())
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


def _check_protocol(values: Mapping[str, Any], refuse: Callable[[str], NoReturn]) -> None:
    if values.get("protocol") != PROTOCOL or isinstance(values.get("protocol"), bool):
        refuse(f"protocol {one_line(str(values.get('protocol'))[:50])}, and this version speaks {PROTOCOL}")
