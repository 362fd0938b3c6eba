"""Combined generation with a guidance scale for each part: a guider for any sampler, and switch and sampler in one node."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from . import host
from .parts import SAME, SamplerSettings, joined, sampled, tuned_part
from .schedule import LEVEL, When
from .sockets import CATEGORY, draw_text, schema
from .switch import SWITCH_INPUTS, rule, switched


class CombinedGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance with a scale, and if wanted a conditioning, for each part; scale 1 evaluates no negative."""

    def set_switch(self, tuned_now: When, cfg: float, tuned_cfg: float) -> None:
        """Which evaluations take the second scale."""
        self.set_cfg(cfg)
        self.tuned_now, self.tuned_cfg = tuned_now, tuned_cfg

    def set_all_conds(self, positive: Any, negative: Any, tuned_positive: Any = None, tuned_negative: Any = None) -> None:
        """Conditioning of both parts; the tuned part's defaults to the base's."""
        given = {"positive": positive, "negative": negative, "tuned_positive": tuned_positive, "tuned_negative": tuned_negative}
        self.inner_set_conds({name: cond for name, cond in given.items() if cond is not None})

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None, **kwargs: Any) -> Any:
        options = dict(model_options or {})
        transformer = options.get("transformer_options", {})
        level = float(timestep.max())
        tuned = self.tuned_now(level, transformer)
        options["transformer_options"] = {**transformer, LEVEL: level}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        if tuned:
            positive, negative = self.conds.get("tuned_positive", positive), self.conds.get("tuned_negative", negative)
        cfg = self.tuned_cfg if tuned else self.cfg
        return comfy.samplers.sampling_function(self.inner_model, x, timestep, negative, positive, cfg, model_options=options, seed=seed)


_CFG = io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the base's part; the paper uses 7.5 (SDXL 5).")
_TUNED_CFG = io.Float.Input(
    "tuned_cfg",
    default=1.0,
    min=0.0,
    max=100.0,
    step=0.1,
    tooltip="Guidance of the tuned part. 1 is none and skips the negative: what the paper uses, since it trains without.",
)
_PROMPTS = [
    io.Conditioning.Input("positive", tooltip="What the image should show."),
    io.Conditioning.Input("negative", tooltip="What it should not show."),
]
_TUNED_PROMPTS = [
    io.Conditioning.Input("tuned_positive", optional=True, tooltip="Another positive for the tuned part. Not connected: the same."),
    io.Conditioning.Input("tuned_negative", optional=True, tooltip="Another negative for the tuned part. Not connected: the same."),
]


_SHOWN = {"mode", "switch_at", "seed", "steps", "cfg", "tuned_cfg", "sampler_name", "scheduler", "tuned_steps"}


def guider(
    model: Any, tuned_now: When, cfg: float, tuned_cfg: float, positive: Any, negative: Any, tuned_positive: Any, tuned_negative: Any
) -> CombinedGuider:
    """A CombinedGuider over a switched model."""
    made = CombinedGuider(model)
    made.set_all_conds(positive, negative, tuned_positive, tuned_negative)
    made.set_switch(tuned_now, cfg, tuned_cfg)
    return made


class CombinedGuiderNode(io.ComfyNode):
    """MODEL + MODEL + CONDITIONING -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLCombinedGuider",
            display_name="Combined Guider",
            category=f"{CATEGORY}/sampling",
            description="Base→Tuned Switch with a guidance scale for each part, for SamplerCustomAdvanced.",
            search_aliases=["combined generation", "two models", "dual model guider"],
            inputs=[*SWITCH_INPUTS, _CFG, _TUNED_CFG, *_PROMPTS, *_TUNED_PROMPTS],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        mode: str,
        switch_at: float,
        strength: float,
        cfg: float,
        tuned_cfg: float,
        positive: Any,
        negative: Any,
        tuned_positive: Any = None,
        tuned_negative: Any = None,
    ) -> io.NodeOutput:
        """The guider."""
        when = rule(tuned, mode, switch_at)
        model = switched(base, tuned, when, strength)
        return io.NodeOutput(guider(model, when, cfg, tuned_cfg, positive, negative, tuned_positive, tuned_negative))


class CombinedKSampler(io.ComfyNode):
    """Base→Tuned Switch and sampler in one, with a guidance scale for each part."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLCombinedKSampler",
            display_name="Combined KSampler",
            hidden=[io.Hidden.unique_id],
            shown=_SHOWN,
            category=f"{CATEGORY}/sampling",
            description="Samples with the base model first, then the tuned model, in one call: any sampler, its history kept.",
            search_aliases=["combined generation", "two models", "refiner", "model swap", "high low noise", "variety"],
            inputs=[
                *SWITCH_INPUTS,
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Seed of the noise."),
                io.Int.Input("steps", default=40, min=1, max=10000, tooltip="Sampler steps; the paper uses 40."),
                _CFG,
                _TUNED_CFG,
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="Any sampler; a multistep sampler keeps its history across the switch, unless the tuned part has another.",
                ),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="Spacing of the noise levels."),
                *_PROMPTS,
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1, sampling starts from the latent."),
                *_TUNED_PROMPTS,
                io.Int.Input(
                    "tuned_steps",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Steps of the tuned part's own schedule, for a turbo model or few-step LoRA after its base. 0: as steps. "
                    "A switch by step or fraction counts the base's steps, one by last steps the tuned part's.",
                ),
                io.Combo.Input(
                    "tuned_sampler_name",
                    options=[SAME, *comfy.samplers.KSampler.SAMPLERS],
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
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        mode: str,
        switch_at: float,
        strength: float,
        seed: int,
        steps: int,
        cfg: float,
        tuned_cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        tuned_positive: Any = None,
        tuned_negative: Any = None,
        tuned_steps: int = 0,
        tuned_sampler_name: str = SAME,
        tuned_scheduler: str = SAME,
    ) -> io.NodeOutput:
        """Sample."""
        first = SamplerSettings(base, steps, sampler_name, scheduler)
        second = tuned_part(first, tuned, tuned_steps, tuned_sampler_name, tuned_scheduler)
        when: When = rule(tuned, mode, switch_at)
        # an impossible switch is refused before any step
        levels = first.sigmas(denoise)
        sigmas, k = joined(levels, levels if second is first else second.sigmas(denoise), when)
        last = len(sigmas) - 1
        sampler = comfy.samplers.sampler_object(sampler_name)
        if second is not first:
            sampler, when = sampled(first, second, k, last)
        model = switched(base, tuned, when, strength)
        latent = host.latent_for(model, latent_image)
        if len(latent) == 0:
            raise ValueError("an empty latent batch: there is nothing to draw")
        if not bool(torch.isfinite(latent).all()):
            raise ValueError("the latent holds numbers that are not finite: look at the node that made it")
        if last > 0:
            alone = {0: "tuned model alone", last: "base model alone"}
            draw_text(cls, alone.get(k, f"tuned from step {k} of {last} on (σ {float(sigmas[k]):.3f})"))
        samples = guider(model, when, cfg, tuned_cfg, positive, negative, tuned_positive, tuned_negative).sample(
            comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index")),
            latent,
            sampler,
            sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, last),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(host.finished(latent_image, samples))


NODES = [CombinedKSampler, CombinedGuiderNode]
