"""Shared by the exactness scripts: the combined sampler, the stock one, and the truth from two separate models."""

from dataclasses import dataclass, replace
from typing import Any

import embedded  # first: it puts ComfyUI on the path
import comfy.sample
import comfy.samplers
import nodes as stock
import torch

switch = embedded.ours("nodes.switch")
combined = embedded.ours("nodes.combined")
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp", "dpm_2")


class TwoModels(comfy.samplers.CFGGuider):
    """The truth: two models that share nothing, routed by the rule, plainly."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        tuned = float(timestep.max()) <= float(sigmas[self.case.k]) * (1 + 1e-4)
        model, cfg = (self.second, self.case.tuned_cfg) if tuned else (self.inner_model, self.case.cfg)
        return comfy.samplers.sampling_function(
            model, x, timestep, self.conds["negative"], self.conds["positive"], cfg, model_options, seed
        )


@dataclass(frozen=True)
class Case:
    """One model family's prompts and settings."""

    positive: Any
    negative: Any
    shape: tuple[int, ...] = (2, 4, 8, 8)
    steps: int = 8
    k: int = 5
    cfg: float = 4.0
    tuned_cfg: float = 1.5

    def latent(self):
        return {"samples": torch.zeros(self.shape)}

    def truth(self, base, tuned, sampler):
        """Base and tuned must be separate models."""
        assert base.model is not tuned.model
        tuned.patch_model()
        tuned.pre_run()
        plan = comfy.samplers.KSampler(base, self.steps, torch.device("cpu"), sampler, "normal", 1.0, {})
        guider = TwoModels(base)
        guider.set_conds(self.positive, self.negative)
        guider.second, guider.case = tuned.model, self
        start = self.latent()["samples"]
        noise = comfy.sample.prepare_noise(start, 3)
        return guider.sample(noise, start, comfy.samplers.sampler_object(sampler), plan.sigmas, disable_pbar=True, seed=3)

    def combined(self, base, tuned, sampler, denoise=1.0, mode="step", at=None, latent=None, **conds):
        at = self.k if at is None else at
        settings = (mode, at, 1.0, 3, self.steps, self.cfg, self.tuned_cfg, sampler, "normal")
        out = combined.CombinedKSampler.execute(
            base, tuned, *settings, self.positive, self.negative, latent or self.latent(), denoise, **conds
        )
        return out.result[0]["samples"]

    def stock(self, model, sampler):
        out = stock.KSampler().sample(model, 3, self.steps, self.cfg, sampler, "normal", self.positive, self.negative, self.latent())
        return out[0]["samples"]

    def ends(self, base, tuned, sampler):
        """Whether k = 0 and k = steps are the stock sampler's results, bit for bit."""
        same = replace(self, tuned_cfg=self.cfg)
        return [
            torch.equal(same.combined(base, tuned, sampler, at=0), self.stock(tuned, sampler)),
            torch.equal(self.combined(base, tuned, sampler, at=self.steps), self.stock(base, sampler)),
        ]


def error(a, b):
    """Relative root mean square."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
