"""Previews of a training run in a graph: images of a few prompts, their rewards, and the curves of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..trainer.data.images import grid, to_pil
from ..trainer.generate import Generation
from ..trainer.guidance import Switch
from ..trainer.training.evaluation import Evaluation
from .policy import ComfyPolicy
from .sockets import figure


def evaluation_of(
    policy: ComfyPolicy, objective: Any, prompts: Sequence[str], rewards: dict[str, Any], guidance_scale: float
) -> Evaluation:
    """Previews and their rewards: two images of each of the first four prompts, by combined generation."""
    switch = Switch(sigma=objective.recommended_sigma(policy.sigmas(objective.steps)))
    generation = Generation(steps=objective.steps, guidance_scale=guidance_scale, seed=0, chunk=4)
    return Evaluation(policy, rewards, [p for p in dict.fromkeys(prompts) if p][:4] * 2, generation, switch)


def preview_of(evaluation: Evaluation, step: int) -> tuple[str, Any, int]:
    """Evaluate, and return the images as ComfyUI's progress bar takes them."""
    evaluation.run(step)
    assert evaluation.images is not None
    return "JPEG", to_pil(grid(evaluation.images, 4)), 512


def curves(log: Mapping[str, Sequence[float]], evaluation: Evaluation) -> Tensor:
    """Mean rewards of the previews, and of every step the training reward or, on pairs, the share of the batch in their order, as IMAGE."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    panel = drawn.subplots()
    if log["reward"]:
        panel.plot(range(1, len(log["reward"]) + 1), log["reward"], color="#bbbbbb", label="training batch")
    if log["accuracy"]:
        right = panel.twinx()
        right.plot(range(1, len(log["accuracy"]) + 1), log["accuracy"], color="#bbbbbb", zorder=0)
        right.set_ylabel("share of the batch's pairs in their order (grey)")
        right.set_ylim(0, 1.02)
    for name in evaluation.rewards:
        steps, values = [p["step"] for p in evaluation.points], [p[name] for p in evaluation.points]
        panel.plot(steps, values, marker="o", label=f"{name}, combined generation")
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("reward, standard deviations of base images")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure(drawn)
