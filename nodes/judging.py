"""Judging in a graph: diversity, distances to real images, and the trade-off of reward and diversity over the switch."""

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
from comfy_api.latest import io, ui
from torch import Tensor

from ..trainer.data.images import grid
from ..trainer.demo import files
from ..trainer.metrics.distances import frechet_distance, log_covariance_distance
from ..trainer.metrics.diversity import within_prompt_diversity
from ..trainer.rng import Rng
from ..trainer.sampling import METHODS, State, prefixes, rollout
from .rewards import prompt_per_image, score, table
from .sockets import CATEGORY, Reward, figure, image, pixels, schema
from .switch import guider, switched

ClipVision = io.Custom("CLIP_VISION")
_VISION = ClipVision.Input(
    "clip_vision",
    optional=True,
    tooltip="What looks at the images: any CLIP Vision model (CLIP, SigLIP, DINOv2). Not connected: the demo's reader, which knows only "
    "the demo world.",
)


@torch.no_grad()
def features(images: Tensor, clip_vision: Any) -> Tensor:
    """(N,3,H,W) in [0,1] -> (N,D)."""
    if clip_vision is not None:
        parts = [clip_vision.encode_image(part.movedim(1, -1), crop="center")["image_embeds"] for part in images.split(64)]
        return torch.cat([part.float().cpu() for part in parts])
    reader = files.load_reader()
    return torch.cat([reader.features(part) for part in images.cpu().split(64)])


class Diversity(io.ComfyNode):
    """IMAGE -> FLOAT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDiversity",
            display_name="Image Diversity",
            category=f"{CATEGORY}/judging",
            description="How different the images of one prompt are: 1 − mean cosine of the features of all pairs. 0 means all alike.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="At least two per prompt."),
                io.String.Input(
                    "prompts", default="", multiline=True, tooltip="Empty: all images are of one prompt. Else one per line and image."
                ),
                _VISION,
            ],
            outputs=[
                io.Float.Output("diversity", display_name="diversity", tooltip="Mean over prompts, 0 to 2."),
                io.String.Output("table", display_name="table", tooltip="Per prompt."),
            ],
        )

    @classmethod
    def execute(cls, images: list[Tensor], prompts: list[str], clip_vision: list[Any] | None = None) -> io.NodeOutput:
        """Measure."""
        batch = torch.cat([pixels(part) for part in images])
        lines = [line for text in prompts for line in text.splitlines() if line.strip()]
        texts = prompt_per_image(lines or [""], len(batch))
        distinct = list(dict.fromkeys(texts))
        groups = torch.tensor([distinct.index(t) for t in texts])
        values = within_prompt_diversity(features(batch, clip_vision[0] if clip_vision else None), groups)
        text = table(("prompt", "images", "diversity"), [(p, texts.count(p), f"{v:.4f}") for p, v in zip(distinct, values.tolist())])
        return io.NodeOutput(float(values.mean()), text, ui=ui.PreviewText(text))


class Distance(io.ComfyNode):
    """IMAGE, IMAGE -> FID and LogCov distance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDistance",
            display_name="FID / LogCov Distance",
            category=f"{CATEGORY}/judging",
            description="How far a batch of images is from another, in the features of a vision model: FID (Fréchet) and the distance "
            "of  log covariances. Comparable only between batches of the same size and the same vision model.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="At least two; the more the better, figures from under a thousand are biased upwards."),
                io.Image.Input("reference", tooltip="Real images."),
                _VISION,
            ],
            outputs=[
                io.Float.Output("fid", display_name="FID", tooltip="Fréchet distance; 0 is the same distribution."),
                io.Float.Output("logcov", display_name="LogCov", tooltip="Distance of log covariances (our own definition)."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, reference: Tensor, clip_vision: Any = None) -> io.NodeOutput:
        """Measure."""
        ours, theirs = features(pixels(images), clip_vision), features(pixels(reference), clip_vision)
        fid, logcov = frechet_distance(ours, theirs), log_covariance_distance(ours, theirs)
        text = f"FID {fid:.3f}, LogCov {logcov:.3f}, {len(ours)} images against {len(theirs)}"
        return io.NodeOutput(fid, logcov, ui=ui.PreviewText(text))


@dataclass
class Manual:
    """A switch that the sweep turns by hand."""

    tuned: bool = False

    def __call__(self, t: Tensor, options: dict[str, Any]) -> bool:
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
        start = State(sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), self.max_denoise(model_wrap, sigmas)))
        steps, taken = len(sigmas) - 1, 0
        total = max(self.switches) + sum(steps - k for k in self.switches)

        def denoiser(tuned: bool) -> Any:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                nonlocal taken
                comfy.model_management.throw_exception_if_processing_interrupted()
                self.switch.tuned = tuned
                denoised = model_wrap(x, sigma, **extra_args)
                if callback is not None:
                    callback(taken, denoised, x, total)
                taken += 1
                return denoised

            return denoise

        shape = tuple(noise.shape[1:])

        def noise_at(i: int) -> Tensor:
            return self.rng.normal(f"step {i}", shape)

        states = prefixes(start, denoiser(False), sigmas, self.switches, noise_at, self.method, space)
        ends = [rollout(states[k], steps, denoiser(True), sigmas, noise_at, self.method, space).x for k in self.switches]
        return torch.cat([sampling.inverse_noise_scaling(sigmas[-1], end) for end in ends])


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
                _VISION,
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
        return io.NodeOutput(shown, plot, text, image(images), ui=ui.PreviewText(text))


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


NODES = [Diversity, Distance, TradeOffSweep]
