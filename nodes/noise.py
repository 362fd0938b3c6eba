"""Optimise Noise: the start noise of a few-step model, changed until its image has more reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.data.images import to_pil
from ..trainer.generate import Generation
from ..trainer.guidance import Slot
from ..trainer.guidance import cfg as combine
from ..trainer.noise.images import NoiseOptimiser
from ..trainer.noise.optimise import Iteration, Optimised
from ..trainer.noise.settings import METHODS, NoiseOptimisation, optimisation_of
from ..trainer.policy import Policy
from ..trainer.sampling import METHODS as SAMPLERS
from . import host
from .autograd import outside_inference
from .conditioning import placed
from .policy import ComfyPolicy
from .rewards import Combined, check_prompt
from .sockets import CATEGORY, Reward, draw_text, figure, schema, widgets

_PROMPT = "positive"


def terms(reward: Any) -> list[tuple[float, Any]]:
    """Weights and rewards of a REWARD_MODEL: those of a sum by themselves."""
    if not isinstance(reward, Combined):
        return [(1.0, reward)]
    return [(weight, part if reward.normalised else Combined(((part, 1.0),), False)) for part, weight in reward.parts]


def check_read(model: Any, latent_image: dict[str, Any], conditionings: Mapping[str, Any]) -> None:
    """ValueError for what a sampler node would heed and an evaluation of the network alone does not: the image would be another.

    conditionings: CONDITIONING by the name of its input.
    """
    patches = host.patches_around(model)
    if patches:
        raise ValueError(
            f"the model has patches that work around its network ({', '.join(patches)}: guidance, density, caching): connect it without; "
            "LoRAs, the shift of the noise levels and attention patches are heeded"
        )
    samples = latent_image["samples"]
    if bool((samples != samples.flatten()[0]).any()) or "noise_mask" in latent_image:
        raise ValueError("the latent holds an image or a mask, and noise is optimised from nothing: connect an empty latent")
    for name, parts in conditionings.items():
        given = placed(parts or ())
        if given:
            raise ValueError(f"{name} has {', '.join(given)}, which noise optimisation does not heed: connect a plain prompt")


class OptimiseNoise(io.ComfyNode):
    """MODEL + CONDITIONING + VAE + REWARD_MODEL -> LATENT, IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        methods = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
        return schema(
            node_id="ImageReFLOptimiseNoise",
            display_name="Optimise Noise",
            category=f"{CATEGORY}/sampling",
            description="Changes the start noise until its image has more reward: by gradient through a few-step model, "
            "or by trying neighbours of the noise.",
            search_aliases=["reno", "carinox", "initial noise optimization", "golden noise", "noise search", "test-time optimization"],
            hidden=[io.Hidden.unique_id],
            shown={"prompt", "seed", "cfg", "method", "iterations"},
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="A few-step model (turbo, Lightning, LCM); any for rotate. LoRAs go before it."),
                io.Conditioning.Input("positive", tooltip="The prompt, encoded."),
                io.Latent.Input("latent_image", tooltip="An empty latent, for the size of the image."),
                io.Sigmas.Input(
                    "sigmas", tooltip="The model's own few noise levels, down to 0: from Basic Scheduler or SD Turbo Scheduler."
                ),
                io.Vae.Input("vae", tooltip="Decodes what is scored."),
                Reward.Input("reward", tooltip="What to raise. reno and carinox need its gradient."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The prompt under which the reward scores the images."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="Of the start noise and all others."
                ),
                io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1, tooltip="Guidance; few-step models take 1, which is none."),
                io.Combo.Input("method", options=list(METHODS), default="reno", tooltip=methods + "."),
                io.Combo.Input(
                    "sampler", options=list(SAMPLERS), default="ddim", tooltip="ddim is euler, ddpm euler_ancestral, and dpmpp_2m itself."
                ),
                *widgets(NoiseOptimisation, ("name",)),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed where cfg is not 1."),
                Reward.Input("heldout", optional=True, tooltip="A reward that is not raised: where it falls, the first is exploited."),
                io.Vae.Input("gradient_vae", optional=True, tooltip="A small VAE (TAESD) for the gradient: far less memory."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The image with the most reward; decode it."),
                io.String.Output("table", display_name="table", tooltip="First and best reward, the held-out one, and what it took."),
                io.Image.Output("plot", display_name="plot", tooltip="Reward and norm of the noise over iterations."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict[str, Any],
        sigmas: Tensor,
        vae: Any,
        reward: Any,
        prompt: str,
        seed: int,
        cfg: float,
        method: str,
        sampler: str,
        negative: Any = None,
        heldout: Any = None,
        gradient_vae: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Optimise."""
        if cfg != 1 and negative is None:
            raise ValueError(f"cfg {cfg:g} needs a negative: connect one, or set cfg to 1")
        check_prompt(prompt, reward, heldout)
        check_read(model, latent_image, {"positive": positive, "negative": negative if cfg != 1 else None})
        optimisation = optimisation_of(method, {key: value for key, value in settings.items() if key in METHODS[method].defaults})
        latent = host.latent_for(model, latent_image)
        if len(latent) != 1 or len(sigmas) < 2 or float(sigmas[-1]) != 0:
            raise ValueError("connect one latent, and sigmas of at least one step down to 0")
        shape = (latent.shape[1], latent.shape[-2], latent.shape[-1])
        with outside_inference(), torch.enable_grad(), host.attention_with_gradient():
            conditions = {_PROMPT: positive, "": negative}
            policy = ComfyPolicy(model, vae, lambda name: conditions[name], shape, gradient_vae)
            generation = Generation(steps=len(sigmas) - 1, method=cast(Any, sampler), seed=seed, guidance_scale=cfg)
            mix = combine(Slot("base", cfg, prompt=_PROMPT))
            levels = sigmas.float().cpu().clone()
            optimiser = NoiseOptimiser(cast(Policy, policy), mix, levels, generation, optimisation, terms(reward))
            found, samples, text = _optimised(cls, policy, optimiser, reward, heldout, prompt)
        return io.NodeOutput(host.finished(latent_image, samples), text, figure(_plot(found.history, reward.name)))


def _optimised(
    node: type[io.ComfyNode], policy: ComfyPolicy, optimiser: NoiseOptimiser, reward: Any, heldout: Any, prompt: str
) -> tuple[Optimised, Tensor, str]:
    """The best noise, its latents as ComfyUI has them, and what is said of them. Cancel raises between two network calls."""
    cost, gradient = optimiser.cost, METHODS[optimiser.optimisation.name].gradient
    draw_text(node, f"{cost.model} model calls, {cost.decodes} decodes and reward calls")
    bar, done = comfy.utils.ProgressBar(cost.decodes), 0

    def report(found: Optimised) -> None:
        nonlocal done
        done += 1
        better = found.history[-1] is found.best
        bar.update_absolute(done, cost.decodes, ("JPEG", to_pil(found.image[0]), 512) if better else None)
        comfy.model_management.throw_exception_if_processing_interrupted()

    policy.gradient_checkpointing(denoiser=gradient, vae=True)
    judges = [one for one in (reward, heldout) if one is not None]
    with policy.loaded([patcher for judge in judges for patcher in judge.patchers], 1):
        found = optimiser(prompt, report=report)
        latents = optimiser.latents(found.noise, prompt)
        with torch.no_grad():
            images = policy.decode(latents)
            last = [float(judge(images, [prompt])[0]) for judge in judges]
        samples = policy.model.model.process_latent_out(policy.framed(latents)).cpu()
    first, best = found.history[0], found.best
    lines = [f"{reward.name}: {first.total:.3f} at first, {last[0]:.3f} at iteration {best.iteration} of start {best.start}"]
    lines += [f"{heldout.name} (held out): {last[1]:.3f}"] if heldout is not None else []
    lines += [f"norm of the noise {best.norm:.3f} of what is drawn", f"{cost.model} model calls, {cost.decodes} decodes and reward calls"]
    return found, samples, "\n".join(lines)


def _plot(history: list[Iteration], label: str) -> Any:
    """A matplotlib Figure: reward over iterations, a line for each start, and the norm of the noise below."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    panels = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for start in range(1 + max(row.start for row in history)):
        rows = [row for row in history if row.start == start]
        for panel, values in zip(panels, ([row.total for row in rows], [row.norm for row in rows])):
            panel.plot([row.iteration for row in rows], values, marker=".", linewidth=1, label=f"start {start}")
    panels[0].set_ylabel(label)
    panels[1].set_ylabel("norm / √size")
    panels[1].set_xlabel("iteration")
    for panel in panels:
        panel.grid(alpha=0.3)
    return drawn


NODES = [OptimiseNoise]
