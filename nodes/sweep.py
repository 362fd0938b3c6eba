"""The trade-off of reward and diversity over the switch, in a graph: one image set per step k, the base's steps taken once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from ..trainer.generate import branches
from ..trainer.guidance import Slot, combined
from ..trainer.metrics.diversity import within_prompt_diversity
from ..trainer.rng import Rng
from ..trainer.sampling import METHODS
from .combined import guider
from .judging import VISION, features
from .scoring import score, table
from .sockets import CATEGORY, Reward, figure, image, pixels, schema, show_text
from .switch import switched


@dataclass
class Manual:
    """A switch that the sweep turns by hand."""

    tuned: bool = False

    def __call__(self, level: float, options: dict[str, Any]) -> bool:
        """Whether the tuned model evaluates."""
        return self.tuned


class Sweep(comfy.samplers.Sampler):
    """A sampler that returns the images of every k, one after the other; the base's steps are taken once."""

    def __init__(self, switches: Sequence[int], switch: Manual, method: Any, rng: Rng) -> None:
        self.switches, self.switch, self.method, self.rng = switches, switch, method, rng

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
        start = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), self.max_denoise(model_wrap, sigmas))
        steps, taken = len(sigmas) - 1, 0
        total = max(self.switches) + sum(steps - k for k in self.switches)

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

        mixes = {k: combined(Slot("base"), Slot("tuned"), k) for k in self.switches}
        noise_at = self.rng.step_noise(tuple(noise.shape[1:]))
        ends = dict(branches(mixes, denoiser, start, sigmas.cpu(), noise_at, self.method, space))
        return torch.cat([sampling.inverse_noise_scaling(sigmas[-1], ends[k]) for k in self.switches])


def parse_switches(text: str, steps: int) -> list[int]:
    """`0, 6, 12, 20` -> step indices, each within the steps."""
    try:
        switches = [int(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"switches {text!r}: write step numbers separated by commas, 0, 15, 30") from None
    if not switches or any(not 0 <= k <= steps for k in switches):
        raise ValueError(f"switches {text!r}: give at least one step, each from 0 to {steps}")
    return list(dict.fromkeys(switches))


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
            "costs in diversity. The base model's steps are computed once for all.",
            search_aliases=["xy plot", "frontier"],
            is_output_node=True,
            inputs=[
                io.Model.Input("base", tooltip="The model that draws the first steps."),
                io.Model.Input("tuned", tooltip="The same model with the reward LoRA, or another checkpoint of the family."),
                io.Conditioning.Input("positive", tooltip="What the images should show."),
                io.Conditioning.Input("negative", tooltip="What they should not show."),
                io.Vae.Input("vae", tooltip="Decodes the results."),
                Reward.Input("reward", tooltip="What scores them."),
                io.String.Input("prompt", multiline=True, tooltip="The prompt, as the reward reads it."),
                io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip="Pixels."),
                io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip="Pixels."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="The first seed."),
                io.Int.Input("seeds", default=4, min=2, max=64, tooltip="Images per switch; diversity needs two."),
                io.Int.Input("steps", default=40, min=1, max=1000, tooltip="Sampler steps; the paper uses 40."),
                io.String.Input(
                    "switches",
                    default="0, 20, 30, 35, 40",
                    tooltip="Steps at which the tuned model takes over: 0 is tuned only, all is base.",
                ),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the base's part; the paper uses 7.5."
                ),
                io.Float.Input("tuned_cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the tuned part; 1 is none."),
                io.Combo.Input(
                    "method", options=list(METHODS), default="ddpm", tooltip="ddpm (ancestral, the paper's), ddim, or dpmpp_2m."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="Spacing of the noise levels."
                ),
                Reward.Input("heldout", optional=True, tooltip="A second reward for the plot, one that training did not see."),
                VISION,
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="One row per switch, one column per seed."),
                io.Image.Output("plot", display_name="plot", tooltip="Reward against diversity."),
                io.String.Output("table", display_name="table", tooltip="Mean reward and diversity per switch."),
                io.Image.Output("images", display_name="IMAGE", tooltip="All images, switch by switch."),
            ],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        positive: Any,
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
        heldout: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Sweep."""
        chosen = parse_switches(switches, steps)
        switch = Manual()
        model = switched(base, tuned, switch)
        ratio = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
        latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(seeds, 4, height // ratio, width // ratio))
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed + i) for i in range(seeds)])
        plan = comfy.samplers.KSampler(model, steps, model.load_device, "euler", scheduler, 1.0, model.model_options)
        sampler = Sweep(chosen, switch, method, Rng(seed, 0, tuple(range(seeds))))
        # with the switch turned by hand, the guider's scale must turn with it
        latents = guider(model, switch, cfg, tuned_cfg, positive, negative, None, None).sample(
            noise,
            latent,
            sampler,
            plan.sigmas,
            callback=latent_preview.prepare_callback(model, max(chosen) + sum(steps - k for k in chosen)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        images = pixels(torch.cat([vae.decode(part) for part in latents.split(seeds)]))
        judges = {"reward": reward, **({"held-out": heldout} if heldout is not None else {})}
        scores = {name: score(judge, images, [prompt] * len(images))[1].reshape(len(chosen), seeds) for name, judge in judges.items()}
        groups = torch.arange(len(chosen)).repeat_interleave(seeds)
        diversity = within_prompt_diversity(features(images, clip_vision), groups).tolist()
        rows = [
            (k, *(f"{s[i].mean():.4f} ± {s[i].std():.4f}" for s in scores.values()), f"{diversity[i]:.4f}") for i, k in enumerate(chosen)
        ]
        text = table(("switch at step", *scores, "diversity"), rows)
        shown = image(grid(images, seeds)[None])
        plot = _plot(chosen, {n: s.mean(1).tolist() for n, s in scores.items()}, diversity)
        lines = [", ".join(f"{name} {value}" for name, value in zip(("step", *scores, "diversity"), row)) for row in rows]
        return io.NodeOutput(shown, plot, text, image(images), ui=show_text(cls, "\n".join(lines)))


def _plot(switches: Sequence[int], scores: dict[str, list[float]], diversity: list[float]) -> Tensor:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    panel = drawn.subplots()
    for name, values in scores.items():
        panel.plot(diversity, values, marker="o", label=name)
        for k, x, y in zip(switches, diversity, values):
            panel.annotate(f"k={k}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    panel.set_xlabel("diversity within the prompt")
    panel.set_ylabel("reward, standard deviations")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure(drawn)


NODES = [TradeOffSweep]
