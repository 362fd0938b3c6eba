"""The trade-off of reward and diversity over the switch, in a graph: one image set per step k, the base's steps taken once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.data.images import grid
from ..trainer.generate import branches, by_start
from ..trainer.guidance import Slot, combined, joined_at
from ..trainer.metrics.diversity import within_prompt_diversity
from ..trainer.rng import Rng
from ..trainer.sampling import METHODS
from ..trainer.text import lines
from .combined import guider
from .judging import VISION, features
from .parts import SAME, Manual, SamplerSettings, tuned_part
from .scoring import score
from .sockets import CATEGORY, Reward, image, pixels, schema, show_text
from .switch import switched
from .tradeoff import Swept


class Sweep(comfy.samplers.Sampler):
    """A sampler that returns the images of every k, one after the other; the base's steps are taken once."""

    def __init__(self, grids: Mapping[int, Tensor], switch: Manual, method: Any, tuned_method: Any, rng: Rng) -> None:
        self.grids, self.switch, self.method, self.tuned_method, self.rng = grids, switch, method, tuned_method, rng

    @property
    def evaluations(self) -> int:
        """How many a run takes: the base's steps once, and those of the tuned model from each switch."""
        return max(self.grids) + sum(len(levels) - 1 - k for k, levels in self.grids.items())

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Latents (K·B,C,h,w)."""
        sampling = model_wrap.inner_model.model_sampling
        space: Any = "flow" if isinstance(sampling, comfy.model_sampling.CONST) else "ve"
        taken, total = 0, self.evaluations

        def denoiser(slot: Slot) -> Any:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                nonlocal taken
                comfy.model_management.throw_exception_if_processing_interrupted()
                self.switch.tuned = slot.adapter == "tuned"
                denoised = model_wrap(x, sigma.to(x.device), **extra_args)
                if callback is not None:
                    callback(taken, denoised, x, total)
                taken += 1
                return denoised

            return denoise

        mixes = {k: combined(Slot("base"), Slot("tuned"), k) for k in self.grids}
        noise_at = self.rng.step_noise(tuple(noise.shape[1:]))
        ends: dict[int, Tensor] = {}
        for members in by_start(mixes, sigmas, self.grids).values():
            levels = self.grids[next(iter(members))].to(sigmas)
            start = sampling.noise_scaling(levels[0], noise, torch.zeros_like(noise), self.max_denoise(model_wrap, levels))
            ends |= branches(members, denoiser, start, sigmas.cpu(), noise_at, self.method, space, self.tuned_method, self.grids)
        return torch.cat([sampling.inverse_noise_scaling(sigmas[-1], ends[k]) for k in self.grids])


class Progress:
    """ComfyUI's progress bar and preview, over the sampling runs of several prompts."""

    def __init__(self, model: Any, evaluations: int, prompts: int) -> None:
        self.evaluations, self.total, self.before = evaluations, evaluations * prompts, 0
        self.show = latent_preview.prepare_callback(model, self.total)

    def __call__(self, taken: int, denoised: Tensor, x: Tensor, total: int) -> None:
        self.show(self.before + taken, denoised, x, self.total)

    def next_prompt(self) -> None:
        """Count from the evaluations so far."""
        self.before += self.evaluations


def conditioned(text: str, positive: Any, clip: Any) -> list[tuple[str, Any]]:
    """Prompts with their conditioning: with a CLIP one for each line, else one prompt, which `positive` must show."""
    prompts = list(dict.fromkeys(line.strip() for line in lines(text) if line.strip()))
    if clip is not None and positive is not None:
        raise ValueError("positive and clip are both connected: disconnect positive, since clip encodes the prompts")
    if clip is not None and not prompts:
        raise ValueError("no prompt: write one per line")
    if clip is not None:
        return [(line, clip.encode_from_tokens_scheduled(clip.tokenize(line))) for line in prompts]
    if positive is None:
        raise ValueError("no conditioning: connect clip, which encodes each line of prompt, or positive for one prompt")
    if len(prompts) > 1:
        raise ValueError(f"{len(prompts)} lines of prompt without a clip: connect clip for one prompt per line, or write one line")
    return [("".join(prompts), positive)]


def parse_switches(text: str, steps: int) -> list[int]:
    """`0, 6, 12, 20` -> step indices, each within the steps."""
    try:
        switches = [int(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"switches {text!r}: write step numbers separated by commas, 0, 15, 30") from None
    if not switches or any(not 0 <= k <= steps for k in switches):
        raise ValueError(f"switches {text!r}: give at least one step, each from 0 to {steps}")
    return list(dict.fromkeys(switches))


def schedules(base: SamplerSettings, tuned: SamplerSettings, switches: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The base's noise levels (T+1,), and those of a run whose tuned part begins at each of its steps."""
    levels = base.sigmas(1.0)
    own = levels if tuned is base else tuned.sigmas(1.0)
    joined = {k: joined_at(levels, own, levels, k) for k in switches}
    close = next((k for k, (_, first) in joined.items() if first != k), None)
    if close is not None:
        raise ValueError(f"the scheduler puts two of its first {close} steps at one noise level: choose another scheduler, or fewer steps")
    return levels, {k: grid for k, (grid, _) in joined.items()}


_MODELS = [
    io.Model.Input("base", tooltip="The model that draws the first steps."),
    io.Model.Input("tuned", tooltip="The same model with the reward LoRA, or another checkpoint of the family."),
    io.Conditioning.Input(
        "positive",
        optional=True,
        tooltip="What the images should show, for one prompt. Not connected: clip encodes the prompts.",
    ),
    io.Conditioning.Input("negative", tooltip="What they should not show."),
    io.Vae.Input("vae", tooltip="Decodes the results."),
    Reward.Input("reward", tooltip="What scores them."),
    io.String.Input(
        "prompt",
        multiline=True,
        tooltip="With clip connected, one prompt per line; else one prompt, the one that positive shows. The reward reads it.",
    ),
]
_SETTINGS = [
    io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip="Pixels."),
    io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip="Pixels."),
    io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="The first seed."),
    io.Int.Input("seeds", default=4, min=2, max=64, tooltip="Images per switch and prompt; diversity needs two."),
    io.Int.Input("steps", default=40, min=1, max=1000, tooltip="Sampler steps; the paper uses 40."),
    io.String.Input(
        "switches",
        default="0, 20, 30, 35, 40",
        tooltip="Steps at which the tuned model takes over: 0 is tuned only, all is base. Plot and table have the base anyway.",
    ),
    io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the base's part; the paper uses 7.5."),
    io.Float.Input("tuned_cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the tuned part; 1 is none."),
    io.Combo.Input("method", options=list(METHODS), default="ddpm", tooltip="ddpm (ancestral, the paper's), ddim, or dpmpp_2m."),
    io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="Spacing of the noise levels."),
]
_OPTIONAL = [
    Reward.Input("heldout", optional=True, tooltip="A second reward for the plot, one that training did not see."),
    VISION,
    io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts, one per line. Several prompts give intervals."),
    io.Int.Input(
        "tuned_steps",
        default=0,
        min=0,
        max=1000,
        optional=True,
        tooltip="Steps of the tuned part's own schedule, for a turbo model or few-step LoRA after its base. 0: as steps. "
        "Switches count the base's steps.",
    ),
    io.Combo.Input(
        "tuned_method",
        options=[SAME, *METHODS],
        default=SAME,
        optional=True,
        tooltip="Sampler of the tuned part. The same keeps its history across the switch; another starts without.",
    ),
    io.Combo.Input(
        "tuned_scheduler",
        options=[SAME, *comfy.samplers.KSampler.SCHEDULERS],
        default=SAME,
        optional=True,
        tooltip="Spacing of the tuned part's noise levels, by the tuned model's own shift.",
    ),
]


class TradeOffSweep(io.ComfyNode):
    """Switches × seeds -> grid, plot, table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSweep",
            display_name="Trade-off Sweep",
            category=f"{CATEGORY}/judging",
            description="Generates the same seeds with the tuned model taking over at several steps, scores each, and shows what reward "
            "costs in diversity, with intervals over several prompts. The base model's steps are computed once for all.",
            search_aliases=["xy plot", "frontier"],
            is_output_node=True,
            inputs=[*_MODELS, *_SETTINGS, *_OPTIONAL],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="One row per switch, one column per seed; prompts side by side."),
                io.Image.Output("plot", display_name="plot", tooltip="Reward against diversity, with intervals; the star is the base."),
                io.String.Output("table", display_name="table", tooltip="Mean reward and diversity per switch, with intervals."),
                io.Image.Output("images", display_name="IMAGE", tooltip="All images, switch by switch and there prompt by prompt."),
            ],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        negative: Any,
        vae: Any,
        reward: Any,
        prompt: str,
        width: int,
        height: int,
        seed: int,
        seeds: int,
        steps: int,
        switches: str,
        cfg: float,
        tuned_cfg: float,
        method: str,
        scheduler: str,
        positive: Any = None,
        heldout: Any = None,
        clip_vision: Any = None,
        clip: Any = None,
        tuned_steps: int = 0,
        tuned_method: str = SAME,
        tuned_scheduler: str = SAME,
    ) -> io.NodeOutput:
        """Sweep."""
        chosen = parse_switches(switches, steps)
        listed, swept = len(chosen), chosen if steps in chosen else [*chosen, steps]
        prompts = conditioned(prompt, positive, clip)
        switch = Manual()
        model = switched(base, tuned, switch)
        ratio = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
        latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(seeds, 4, height // ratio, width // ratio))
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed + i) for i in range(seeds)])
        first = SamplerSettings(model, steps, "euler", scheduler)
        sigmas, grids = schedules(first, tuned_part(first, tuned, tuned_steps, SAME, tuned_scheduler), swept)
        sampler = Sweep(grids, switch, method, None if tuned_method == SAME else tuned_method, Rng(seed, 0, tuple(range(seeds))))
        callback = Progress(model, sampler.evaluations, len(prompts))
        drawn: list[Tensor] = []
        for _, conditioning in prompts:
            # the scale of guidance must turn with the switch
            drawer = guider(model, switch, cfg, tuned_cfg, conditioning, negative, None, None)
            quiet = not comfy.utils.PROGRESS_BAR_ENABLED
            drawn.append(drawer.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=quiet, seed=seed))
            callback.next_prompt()
        latents = torch.stack([part.unflatten(0, (len(swept), seeds)) for part in drawn], 1).flatten(0, 1)  # switch by switch
        images = pixels(torch.cat([vae.decode(part) for part in latents]))
        judges = {"reward": reward, **({"held-out": heldout} if heldout is not None else {})}
        found = judged(images, [text for text, _ in prompts], swept, steps, judges, clip_vision)
        columns = len(prompts) * seeds
        asked = images[: listed * columns]
        return io.NodeOutput(image(grid(asked, columns)[None]), found.plot(), found.table(), image(asked), ui=show_text(cls, found.lines()))


def judged(images: Tensor, prompts: Sequence[str], switches: Sequence[int], steps: int, judges: Mapping[str, Any], vision: Any) -> Swept:
    """The figures of images (K·P·S,3,H,W), which lie switch by switch and there prompt by prompt."""
    shape = (len(switches), len(prompts), len(images) // (len(switches) * len(prompts)))
    texts = [text for _ in switches for text in prompts for _ in range(shape[2])]
    scores = {name: score(reward, images, texts)[1].reshape(shape) for name, reward in judges.items()}
    groups = torch.arange(shape[0] * shape[1]).repeat_interleave(shape[2])
    diversity = within_prompt_diversity(features(images, vision), groups).reshape(shape[:2])
    standardised = all(getattr(reward, "standardised", False) for reward in judges.values())
    return Swept(switches, steps, scores, diversity, "standard deviations" if standardised else "")


NODES = [TradeOffSweep]
