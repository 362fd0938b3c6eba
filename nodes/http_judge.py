"""A judge behind HTTP as a REWARD_MODEL: HPSv3, UnifiedReward, VQAScore or any other in an environment of its own."""

from __future__ import annotations

import os
import time
from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..trainer.reward import RewardUnavailable
from ..trainer.rewards.http_judge import LIMITS, HttpJudge, Limits
from ..trainer.rewards.registry import WeightFolders
from .rewards import Loaded
from .sockets import CATEGORY, Reward, schema

_ALLOWED = "IMAGEREFL_ALLOW_REMOTE"  # in the server's environment: a workflow cannot send images elsewhere by itself


class Cancelled(RewardUnavailable, comfy.model_management.InterruptProcessingException):
    """Cancel while a judge was waited for: a training run saves its state."""


def _heed_cancel() -> None:
    try:
        comfy.model_management.throw_exception_if_processing_interrupted()
    except comfy.model_management.InterruptProcessingException as error:
        raise Cancelled("cancelled") from error


def connect(url: str, limits: Limits) -> HttpJudge:
    """The judge behind a URL, on this machine unless the server's environment allows others."""
    if not url.strip():
        raise ValueError("url is empty: start a judge (docs/judges.md), and give its URL, such as http://127.0.0.1:8077")
    try:
        return HttpJudge.connect(url.strip(), os.environ.get(_ALLOWED) == "1", limits, _heed_cancel)
    except RewardUnavailable as error:
        if "--allow-remote" not in str(error):
            raise
        raise ValueError(f"{str(error).partition(', or allow it')[0]}, or start ComfyUI with {_ALLOWED}=1") from error


class HTTPJudge(io.ComfyNode):
    """URL -> REWARD_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLHTTPJudge",
            display_name="HTTP Judge",
            category=f"{CATEGORY}/rewards",
            description="A reward that runs in an environment of its own and is asked over HTTP: HPSv3, UnifiedReward, VQAScore, any VLM. "
            "It has no gradient: for scoring, picking, search, policy gradients, and as the held-out reward.",
            search_aliases=["hpsv3", "unifiedreward", "vqascore", "vlm judge", "remote reward", "external reward"],
            inputs=[
                io.String.Input(
                    "url",
                    default="",
                    placeholder="http://127.0.0.1:8077",
                    tooltip="Of a judge on this machine; docs/judges.md says how to start one.",
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=600.0,
                    step=1.0,
                    tooltip="That one batch may take; 0: what the judge says. Then it is asked three times more.",
                ),
            ],
            outputs=[Reward.Output("reward", display_name="REWARD_MODEL", tooltip="For scoring, search, policy gradients and judging.")],
        )

    @classmethod
    def fingerprint_inputs(cls, url: Any = None, **_: Any) -> str:
        """The judge's name and version; while none answers, something new each time."""
        try:
            return connect(url, Limits(2.0, retries=0)).digest if isinstance(url, str) else ""
        except ValueError:
            return str(time.time())

    @classmethod
    def execute(cls, url: str, seconds: float) -> io.NodeOutput:
        """Ask the judge what it is."""
        judge = connect(url, Limits(seconds, LIMITS.retries, LIMITS.pause))
        mean, judge.std = WeightFolders().read_statistics(judge.endpoint.url) or judge.statistics or (None, None)
        return io.NodeOutput(Loaded(judge.capabilities.name, judge, mean, judge.std))


NODES = [HTTPJudge]
