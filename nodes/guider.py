"""Two-model guidance in a graph: one guider for every guide of the trainer, over one set of weights or two checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io

from ..trainer.config import build
from ..trainer.guidance import Mix, Slot
from ..trainer.guides import GUIDES, OF_TWO, Guide, misplaced, step_at
from . import proxy as proxies
from .schedule import LEVEL
from .sockets import CATEGORY, schema, widgets
from .switch import ATTACHMENT, switched

NOW = "imagerefl_model"  # in the transformer options of an evaluation: the model that takes it
PROMPT, NEGATIVE, PROXY = "positive", "negative", "proxy"  # a guider's conditionings

Branch = tuple[str, str]
"""A model (`base` or `tuned`) and the name of the conditioning that it sees."""


def tuned_now(level: float, options: dict[str, Any]) -> bool:
    """Whether the tuned model takes an evaluation."""
    return options.get(NOW) == "tuned"


def flattened(parts: Sequence[tuple[Slot, float]], *, one: bool = False) -> dict[Branch, float]:
    """The coefficient of each branch, where it is not 0: guidance s inside a slot is s of its prompt and 1 − s of its negative.

    one: base and tuned are one model.
    """
    found: dict[Branch, float] = {}
    for slot, value in parts:
        seen = PROMPT if slot.prompt_weight == 1 else NEGATIVE if slot.prompt_weight == 0 else PROXY
        for branch, share in ((seen, slot.guidance_scale), (NEGATIVE, 1 - slot.guidance_scale)):
            key = ("base" if one else slot.adapter, branch)
            found[key] = found.get(key, 0.0) + share * value
    return {branch: value for branch, value in found.items() if value != 0}


def as_guidance(branches: dict[Branch, float]) -> tuple[dict[Branch, float], dict[Branch, float], float]:
    """The mix as scale·cond + (1 − scale)·uncond, each a weighted mean: the prompt against the rest, else the tuned model against the base.

    Where neither splits it, the whole is cond with scale 1, and uncond is empty.
    """
    for first in (lambda b: b[1] == PROMPT, lambda b: b[0] == "tuned"):
        chosen = {branch: value for branch, value in branches.items() if first(branch)}
        rest = {branch: value for branch, value in branches.items() if branch not in chosen}
        scale, others = sum(chosen.values()), sum(rest.values())
        if chosen and rest and scale != 0 and others != 0:
            return {b: v / scale for b, v in chosen.items()}, {b: v / others for b, v in rest.items()}, scale
    return branches, {}, 1.0


class TwoModelGuider(comfy.samplers.CFGGuider):
    """D = Σ coefficient·D of two models, each on prompt, negative or proxy prompt.

    ComfyUI's patches of guidance (before, in and after CFG) run once, over the whole: `as_guidance` says what they see.
    """

    def set_guide(self, guide: Guide, cfg: float, tuned_cfg: float, *, one: bool) -> None:
        """Which mix, the scales s of base and tuned model, and whether these two are one."""
        self.set_cfg(cfg)
        self.guide, self.slots, self.one = guide, (Slot("base", cfg), Slot("tuned", tuned_cfg)), one
        self._planned: tuple[torch.Tensor, list[float], Mix] | None = None

    def set_prompts(self, positive: Any, negative: Any, proxy: Any) -> None:
        """What the branches see; `proxy` may be None where no coefficient is on it."""
        given = {PROMPT: positive, NEGATIVE: negative, PROXY: proxy}
        self.inner_set_conds({name: cond for name, cond in given.items() if cond is not None})

    def plan(self, sigmas: torch.Tensor) -> tuple[list[float], Mix]:
        """The levels of a run and its mix, made once for a run: reading levels waits for the GPU."""
        if self._planned is None or self._planned[0] is not sigmas:
            levels: list[float] = sigmas.tolist()
            if len(levels) > 1 and levels[0] < levels[-1]:
                raise ValueError("noise levels rise in this run (flipped sigmas): two-model guidance needs levels that fall")
            mix = self.guide.mix(*self.slots, sigmas.cpu())
            mix.calls(levels)  # a mix that cannot be is refused before the first evaluation
            self._planned = sigmas, levels, mix
        return self._planned[1:]

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None, **kwargs: Any) -> Any:
        options = dict(model_options or {})
        transformer = options.get("transformer_options", {})
        level = float(timestep.max())
        levels, mix = self.plan(transformer["sample_sigmas"])
        parts = mix.at(step_at(levels, level), level)

        def by(model: str) -> dict[str, Any]:
            return {**options, "transformer_options": {**transformer, LEVEL: level, NOW: model}}

        if len(parts) == 1 and parts[0][0].prompt_weight == 1:  # one model with guidance of its own: as the stock guider
            slot = parts[0][0]
            given = (self.conds[NEGATIVE], self.conds[PROMPT], slot.guidance_scale)
            return comfy.samplers.sampling_function(self.inner_model, x, timestep, *given, model_options=by(slot.adapter), seed=seed)
        branches = flattened(parts, one=self.one)
        predicted = self._predicted(branches, x, timestep, by)
        cond, uncond, scale = as_guidance(branches)
        return self._guided(cond, uncond, scale, predicted, x, timestep, by("tuned"))

    def _predicted(self, branches: dict[Branch, float], x: Any, timestep: Any, by: Any) -> dict[Branch, Any]:
        """The x0-prediction of each branch; those of one model are evaluated together, as ComfyUI does for CFG."""
        found: dict[Branch, Any] = {}
        for model in dict.fromkeys(model for model, _ in branches):
            comfy.model_management.throw_exception_if_processing_interrupted()
            used = [name for other, name in branches if other == model]
            # the positive is the first and what stands for a negative the second: patches tell them by their place
            names = [PROMPT, *([name for name in (NEGATIVE, PROXY) if name in used])]
            conds, options = [self.conds[name] if name in used else None for name in names], by(model)
            if "sampler_calc_cond_batch_function" in options:
                given = {"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model, "model_options": options}
                out = options["sampler_calc_cond_batch_function"](given)
            else:
                out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
            found.update({(model, name): value for name, value in zip(names, out) if name in used})
        return found

    def _guided(
        self, cond: dict[Branch, float], uncond: dict[Branch, float], scale: float, predicted: Any, x: Any, t: Any, options: Any
    ) -> Any:
        """scale·cond + (1 − scale)·uncond, as ComfyUI's guidance does it, patches included."""

        def mean(branches: dict[Branch, float]) -> Any:
            first, *others = [predicted[b] if value == 1 else value * predicted[b] for b, value in branches.items()]
            return sum(others, first)

        conds = [self.conds[next(name for _, name in group)] for group in (cond, uncond or cond)]
        out = [mean(cond), mean(uncond or cond)]
        for patch in options.get("sampler_pre_cfg_function", []):
            given = {"conds": conds, "conds_out": out, "cond_scale": scale, "timestep": t, "input": x, "sigma": t}
            out = patch({**given, "model": self.inner_model, "model_options": options})
        return comfy.samplers.cfg_function(
            self.inner_model, out[0], out[1], scale, x, t, model_options=options, cond=conds[0], uncond=conds[1]
        )


def guider(base: Any, tuned: Any, guide: Guide, cfg: float, tuned_cfg: float, positive: Any, negative: Any, proxy: Any) -> TwoModelGuider:
    """A guider over two models; without `tuned` the base is both. A proxy prompt that is not given is made of the other two."""
    if proxy is None and "proxy" in guide.reads(cfg, tuned_cfg):
        proxy = proxies.proxy_prompt(positive, negative, guide.proxy)  # pyright: ignore[reportAttributeAccessIssue]
    made = TwoModelGuider(base if tuned is None else switched(base, tuned, tuned_now))
    made.set_guide(guide, cfg, tuned_cfg, one=tuned is None)
    made.set_prompts(positive, negative, proxy)
    return made


def guide_of(name: str, tuned: Any, values: dict[str, Any]) -> Guide:
    """The guide of a node's widgets; `auto` as the switch is the level that the tuned model's LoRA recommends."""
    known = {field.name for field in dataclasses.fields(GUIDES[name])}  # pyright: ignore[reportArgumentType]
    given = {key: value for key, value in values.items() if key in known}
    if given.get("switch") == "auto":
        recommended = None if tuned is None else (tuned.get_attachment(ATTACHMENT) or {}).get("switch_sigma")
        if recommended is None:
            raise ValueError("switch auto needs a LoRA that says where to switch: load one trained by ImageReFL with Load Reward LoRA")
        given["switch"] = f"sigma={recommended}"
    return build(GUIDES[name], given, f"{name}.")


def _widgets() -> list[Any]:
    """One widget for each setting of the guides, with the names of those that read it."""
    found: dict[str, Any] = {}
    users: dict[str, list[str]] = {}
    for name, guide in GUIDES.items():
        for one in widgets(guide):
            found.setdefault(one.id, one)
            users.setdefault(one.id, []).append(name)
    for key, one in found.items():
        one.tooltip = f"For {', '.join(users[key])}. {one.tooltip}"
    found["table"].multiline = True
    return list(found.values())


_PLACES = {
    "npo": "load it on base, and connect a model without it to tuned",
    "chats": "connect the model with the winner to tuned, that with the loser to base",
}
_MODELS = [
    io.Model.Input(
        "base",
        tooltip="The base model. npo: the negative model, which has the tuned model's LoRA and the NPO LoRA. chats: the loser. "
        "autoguidance: the weaker model.",
    ),
    io.Model.Input(
        "tuned",
        optional=True,
        tooltip="The same model with another LoRA loaded on it, or another checkpoint of the family. Not connected: the base, for chats or "
        "custom coefficients on one model.",
    ),
]
_PROMPTS = [
    io.Conditioning.Input("positive", tooltip="What the image should show."),
    io.Conditioning.Input("negative", tooltip="What it should not show."),
    io.Conditioning.Input(
        "proxy_prompt",
        optional=True,
        tooltip="For chats, custom. What the loser sees. Not connected: made of positive and negative with the widget proxy.",
    ),
]
_GUIDANCE = [
    io.Combo.Input(
        "guide",
        options=list(GUIDES),
        default="rl",
        tooltip="rl: base + weight·(tuned − base). aig: from base to tuned. autoguidance: rl without cfg. npo: cfg whose negative is the "
        "base's. chats: npo on a proxy prompt. double-cfg: guidance of both. combined: base first, then tuned.",
    ),
    io.Float.Input(
        "cfg",
        default=5.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Guidance scale s. rl: of both models. combined, aig, double-cfg: of the base. npo: as cfg. chats: s, which is cfg − 1 "
        "(authors: 5). autoguidance and custom have none.",
    ),
    io.Float.Input(
        "tuned_cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="For combined, aig, double-cfg. Guidance scale of the tuned model; 1 is none.",
    ),
]


class TwoModelGuiderNode(io.ComfyNode):
    """MODEL + MODEL + CONDITIONING -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLTwoModelGuider",
            display_name="Two-Model Guider",
            shown={"guide", "cfg", "weight"},
            category=f"{CATEGORY}/sampling",
            description="Guidance by a base and a tuned model at once, for SamplerCustomAdvanced: RL guidance (alignment weaker or "
            "stronger than trained), Diffusion-NPO, Self-NPO, CHATS, autoguidance, annealing, combined generation, or custom coefficients.",
            search_aliases=["RLG", "RL guidance", "NPO", "Self-NPO", "CHATS", "autoguidance", "AIG", "dual model guider", "negative model"],
            inputs=[*_MODELS, *_GUIDANCE, *_widgets(), *_PROMPTS],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        guide: str,
        cfg: float,
        tuned_cfg: float,
        positive: Any,
        negative: Any,
        tuned: Any = None,
        proxy_prompt: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """The guider."""
        if tuned is None and guide in (*OF_TWO, "combined"):
            raise ValueError(f"{guide} needs two models: connect tuned, or choose npo, chats or custom")
        for model, is_tuned in ((base, True),) if tuned is None else ((base, False), (tuned, True)):
            if what := misplaced(guide, model.get_attachment(ATTACHMENT) or {}, is_tuned):
                raise ValueError(f"the LoRA of {'tuned' if is_tuned and tuned is not None else 'base'} is {what}: {_PLACES[guide]}")
        chosen = guide_of(guide, tuned, settings)
        read = chosen.reads(cfg, tuned_cfg)
        if tuned_cfg != 1 and "tuned_guidance_scale" not in read:
            raise ValueError(f"{guide} does not read tuned_cfg: set it to 1")
        if proxy_prompt is not None and "proxy" not in read:
            raise ValueError(f"{guide} has no coefficient on proxy_prompt with these settings: leave it unconnected")
        return io.NodeOutput(guider(base, tuned, chosen, cfg, tuned_cfg, positive, negative, proxy_prompt))


NODES = [TwoModelGuiderNode]
