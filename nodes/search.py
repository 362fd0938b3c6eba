"""Reward Search: the sampler node that spends model calls on the candidates with the most reward."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.search.loop import Found
from ..trainer.search.plan import Round, check, cost, fitted, rounds_of
from ..trainer.search.settings import METHODS, Search, search_of
from . import host
from .lists import rgb
from .particles import SearchSampler, branches, calls_per_step, name_of
from .rewards import check_prompt
from .scoring import score, table
from .sockets import CATEGORY, Reward, draw_text, figure, schema


def decoded(vae: Any, latents: Tensor, chunk: int) -> Tensor:
    """LATENT samples (n,…) -> images (n,3,H,W) on the CPU, in [0,1] where they are finite."""
    found: list[Tensor] = []
    for part in latents.split(chunk):
        comfy.model_management.throw_exception_if_processing_interrupted()
        image = vae.decode(part)
        if image.ndim == 5 and image.shape[1] != 1:
            raise ValueError(f"the latent is a video of {image.shape[1]} frames: a search scores images")
        found.append(rgb(image.flatten(0, 1) if image.ndim == 5 else image).cpu())
    return torch.cat(found)


def rewards(reward: Any, vae: Any, latents: Tensor, prompt: str, chunk: int) -> Tensor:
    """The rewards (n,) of LATENT samples; NaN where an image is not finite."""
    images = decoded(vae, latents, chunk)
    found = score(reward, list(images.nan_to_num()), [prompt] * len(images), chunk)[1]
    return found.masked_fill(~images.isfinite().flatten(1).all(1), torch.nan)


_INTEGERS = {
    "budget": (
        320,
        0,
        10**7,
        "Model calls: as many particles (best-of-n, fk) or children (the others) as they allow. 0: as many as given below.",
    ),
    "images": (1, 1, 4096, "How many to return, best first."),
    "particles": (1, 1, 4096, "Candidates that survive a selection. At least as many as images."),
    "children": (4, 1, 4096, "Candidates drawn from each of them; best-of-n and fk have none."),
    "block": (0, 0, 1000, "code, fk: sampler steps between selections. 0: a fifth of all steps."),
    "chunk": (16, 1, 4096, "Candidates that are evaluated, decoded and scored at a time: lower it where memory runs out."),
}
_FLOATS = {
    "diversity": (0.0, 0.0, 1e6, "Return images greedily by reward + this · distance. 0: the best ones."),
    "start": (0.0, 0.0, 1.0, "Share of the steps before the first selection."),
    "end": (1.0, 0.0, 1.0, "Share of the steps after which none is selected."),
    "strength": (10.0, 0.0, 1e6, "fk: λ of its weights exp(λ·reward), in standard deviations of the reward."),
    "ess": (0.5, 0.0, 1.0, "fk: resample when the effective sample size is below this share. 1: always."),
    "temperature": (0.0, 0.0, 1e6, "svdd: draw a child by softmax(reward / this). 0: the best child."),
}
_LATE = {
    "lookahead": (1, 1, 100, "Deterministic steps to the image that is scored; each costs a model call per candidate."),
    "oversample": (5, 1, 100, "dsearch: particles at the start, as a multiple."),
}


def _number(kind: Any, name: str, default: Any, low: Any, high: Any, tooltip: str) -> Any:
    more = {"step": 0.05} if kind is io.Float else {}
    return kind.Input(name, default=default, min=low, max=high, tooltip=tooltip, **more)


class RewardSearch(io.ComfyNode):
    """NOISE + GUIDER + SAMPLER + SIGMAS + REWARD_MODEL + VAE -> the best LATENTs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        methods = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
        return schema(
            node_id="ImageReFLSearch",
            display_name="Reward Search",
            category=f"{CATEGORY}/sampling",
            description="Samples several candidates, scores what each is going to be, and goes on from the best: SamplerCustomAdvanced "
            "with a reward and a budget of model calls.",
            search_aliases=["best of n", "svdd", "code", "feynman-kac", "fk steering", "beam search", "dsearch", "inference scaling"],
            hidden=[io.Hidden.unique_id],
            shown={"method", "budget", "images", "prompt", "chunk"},
            inputs=[
                io.Noise.Input("noise", tooltip="Noise of the start, one for each candidate; its seed is that of the steps, too."),
                io.Guider.Input("guider", tooltip="The model with its guidance."),
                io.Sampler.Input("sampler", tooltip="Ancestral (euler_ancestral, say); best-of-n takes any."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels, down to 0."),
                io.Latent.Input(
                    "latent_image", tooltip="One latent: empty, or of an image to start from, with sigmas of a denoise below 1."
                ),
                Reward.Input("reward", tooltip="What the search maximises."),
                io.Vae.Input("vae", tooltip="Decodes what is scored: the model's, or a small one (TAESD), which is faster."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The prompt under which the reward scores the images."),
                io.Combo.Input("method", options=list(METHODS), default="code", tooltip=methods + "."),
                *(_number(io.Int, name, *rest) for name, rest in _INTEGERS.items()),
                *(_number(io.Float, name, *rest) for name, rest in _FLOATS.items()),
                io.Combo.Input(
                    "potential", options=["max", "diff", "add", "rt"], default="max", tooltip="fk: weight by maximum, change, sum or value."
                ),
                *(_number(io.Int, name, *rest) for name, rest in _LATE.items()),
                Reward.Input("heldout", optional=True, tooltip="A reward that the search does not see, for the table."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The best ones, best first."),
                io.String.Output("table", display_name="table", tooltip="Their rewards, and what the search spent."),
                io.Image.Output("tree", display_name="tree", tooltip="Reward over steps: every candidate, and which survived."),
                io.String.Output("csv", display_name="csv", tooltip="The tree: step, particle, parent, score, survives, log-weight."),
            ],
        )

    @classmethod
    def execute(
        cls,
        noise: Any,
        guider: Any,
        sampler: Any,
        sigmas: Tensor,
        latent_image: dict[str, Any],
        reward: Any,
        vae: Any,
        prompt: str,
        method: str,
        budget: int,
        images: int,
        chunk: int,
        diversity: float,
        heldout: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Search."""
        search, rounds = _planned(guider.model_patcher, sampler, sigmas, method, budget, images, noise.seed, settings)
        latent = _one(guider.model_patcher, latent_image)
        check_prompt(prompt, reward, heldout)
        plan = cost(search, rounds)
        draw_text(cls, f"{plan.model * calls_per_step(sampler)} model calls, {plan.decodes} decodes and reward calls")
        copies = {**latent_image, "samples": latent.expand(rounds[0].rows, *latent.shape[1:])}
        copies.pop("batch_index", None)
        drawn = noise.generate_noise(copies)
        if rounds[0].rows > 1 and bool((drawn == drawn[:1]).all()):
            raise ValueError("the noise is the same for every candidate: connect Random Noise")

        def scored(latents: Tensor) -> Tensor:
            return rewards(reward, vae, latents, prompt, chunk)

        kind = SearchSampler(sampler, search, rounds, drawn, scored, noise.seed, chunk, images, diversity)
        rows = min(chunk, len(drawn))
        best = guider.sample(
            drawn[:rows].contiguous(),
            latent.expand(rows, *latent.shape[1:]).contiguous(),
            kind,
            sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(guider.model_patcher, plan.model * calls_per_step(sampler)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=noise.seed,
        )
        assert kind.found is not None
        others = None if heldout is None else rewards(heldout, vae, best, prompt, chunk).tolist()
        text = _summary(kind.found, kind.chosen, others)
        held = f" (held-out {others[0]:.3f})" if others else ""
        draw_text(cls, f"best {kind.found.scores[kind.chosen[0]]:.3f}{held}; {_spent(kind.found)}")
        kept = {name: value for name, value in latent_image.items() if name != "batch_index"}
        tree = figure(kind.found.tree.figure(reward.name))
        return io.NodeOutput(host.finished(kept, best), text, tree, kind.found.tree.csv())


def _planned(
    model: Any, sampler: Any, sigmas: Tensor, method: str, budget: int, images: int, seed: int, settings: dict[str, Any]
) -> tuple[Search, list[Round]]:
    """The search and its rounds; ValueError in one line where it cannot run."""
    levels, name = sigmas.tolist(), name_of(sampler)
    if len(levels) < 2 or levels[-1] != 0:
        raise ValueError("a search scores finished images: connect sigmas of at least one step, the last of them 0")
    if "cfg_pp" in name:
        raise ValueError(f"{name} reads the parts of guidance of one batch: connect a sampler without CFG++")
    given = {key: value for key, value in settings.items() if key in METHODS[method].defaults}
    search = search_of(method, {**given, "particles": max(images, settings["particles"])})
    if budget:
        search = fitted(search, len(levels) - 1, budget // calls_per_step(sampler), images, seed)
    rounds = rounds_of(search, len(levels) - 1, seed)
    check(search, rounds, images, len(rounds) == 1 or branches(sampler, model, sigmas), f"sampler {name}")
    return search, rounds


def _one(model: Any, latent_image: dict[str, Any]) -> Tensor:
    """The one latent of a LATENT, with the model's channels."""
    if getattr(latent_image["samples"], "is_nested", False):
        raise ValueError("the latent holds several tensors (video and sound, say): a search scores images")
    latent = host.latent_for(model, latent_image)
    if len(latent) != 1:
        raise ValueError(f"{len(latent)} latents: connect one, which the search copies; `images` says how many come out")
    return latent


def _summary(found: Found, chosen: list[int], heldout: list[float] | None) -> str:
    """Markdown: a row for each image, then what was spent."""
    header = ("image", "reward", *(("held-out",) if heldout else ()))
    rows = [(n, f"{found.scores[i]:.4f}", *((f"{heldout[n]:.4f}",) if heldout else ())) for n, i in enumerate(chosen)]
    return f"{table(header, rows)}\n\n{_spent(found)}"


def _spent(found: Found) -> str:
    return f"{found.counts.model} model calls, {found.counts.decodes} decodes, {found.counts.rewards} reward calls"


NODES = [RewardSearch]
