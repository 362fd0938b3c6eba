"""A training run over a ComfyUI model: the headless trainer's run, with progress, preview and Cancel."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.config import build, plain
from ..trainer.data.samples import Samples
from ..trainer.lora.file import lora_tensors
from ..trainer.memory.offload import offloads
from ..trainer.policy import Lora, with_companions
from ..trainer.text import counted
from ..trainer.training.config import TrainConfig, Watch
from ..trainer.training.console import steps_until
from ..trainer.training.evaluation import Evaluation
from ..trainer.training.loop import NonFinite
from ..trainer.training.parts import Parts
from ..trainer.training.run import Run
from . import host
from .autograd import outside_inference
from .folder import CaptionedFolder
from .graph_checks import Warnings, check, heldout_apart
from .latents import pixels_per_latent
from .lora import TrainedLora
from .memory import GraphPlanner, offloaded, recomputing, settings_that_fit
from .policy import ComfyPolicy
from .preferences import PreferencePairs
from .preview import curves, evaluation_of, preview_of
from .rewards import hashes, in_dtype
from .run_folders import NEW, logged, run_folder
from .sockets import image
from .switch import ATTACHMENT
from .training_data import TrainingData, training_data

log = logging.getLogger(__name__)
Rewards = tuple[Any, Any, Any]
"""What is trained on, features, and the held-out one; the last two may be None."""
Preview = tuple[int, float]
"""Steps between previews, and their guidance scale."""


def _fingerprint(model: Any, data: Any) -> str:
    """A short hash of a model's kind and first weights, and of prompts or images."""
    digest = hashlib.blake2b(digest_size=8)
    if model is not None:
        digest.update(repr([(n, tuple(p.shape)) for n, p in model.model.diffusion_model.named_parameters()]).encode())
        name, first = next((n, p) for n, p in model.model.diffusion_model.named_parameters() if p.ndim > 1)
        # while a LoRA is loaded, on whichever clone, the model's own weight waits in the backup that all clones share
        first = getattr(model.backup.get(f"diffusion_model.{name}"), "weight", first)
        digest.update(first.detach().float().cpu().flatten()[:4096].clone().numpy().tobytes())
    digest.update(data.detach().cpu().clone().numpy().tobytes() if isinstance(data, Tensor) else "\n".join(data).encode())
    return digest.hexdigest()


def unheeded(model: Any) -> str:
    """What the report says of a model's patches that training leaves out, with a line break before it; logged, too."""
    patches = host.patches_around(model)
    if not patches:
        return ""
    said = (
        f"patches that work around the network ({', '.join(patches)}: guidance, density, caching) count in sampling and not in training; "
        "LoRAs, the shift of the noise levels and attention patches count in both"
    )
    log.warning(said)
    return f"\n{said}"


def _condition(clip: Any, conditioning: Any) -> Any:
    """How a prompt becomes CONDITIONING: by the CLIP, or the given one whatever the prompt."""
    if clip is not None:
        return lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    if conditioning is not None:
        return lambda prompt: conditioning
    raise ValueError("connect a clip, which encodes each prompt, or a conditioning, which stands for all of them")


def _latent_shape(model: Any, vae: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C,h,w) of an image of (height, width) pixels."""
    ratio = pixels_per_latent(vae)
    return model.get_model_object("latent_format").latent_channels, size[0] // ratio, size[1] // ratio


def _config(folder: Path, objective: tuple[str, Any], reward: Any, lora: Lora, settings: dict[str, Any]) -> TrainConfig:
    """The config that a headless run of this graph would have, as far as no memory mode changes it."""
    settings = {"offload_encoders": False, "gradient_checkpointing_vae": True, **settings}
    table = {"name": objective[0], **plain(objective[1])}
    return build(TrainConfig, {**settings, "out": str(folder), "objective": table, "reward": reward.name, "lora": plain(lora)})


def _fitted_config(
    memory: str, config: TrainConfig, policy: ComfyPolicy, rewards: Rewards, data: TrainingData, preview: Preview, resumed: bool
) -> tuple[TrainConfig, str]:
    """The config with the memory settings of a mode, and of the run that is resumed, and what the report says of them."""
    every, guidance_scale = preview
    distinct = set(data.texts)
    watch = Watch(every, count=min(4, len(distinct)), images=2, guidance_scale=guidance_scale)
    planner = lambda: GraphPlanner(policy, rewards, len({*distinct, ""}), watch, data.count)  # noqa: E731
    return settings_that_fit(memory, config, policy, planner, resumed)


def _trained(
    policy: ComfyPolicy, config: TrainConfig, samples: Samples, rewards: Rewards, texts: Sequence[str], preview: Preview, resumed: bool
) -> tuple[TrainedLora, dict[str, Any], Evaluation, str]:
    """Train from the start or from the checkpoint: the LoRA, its metadata, the previews and the report."""
    reward, features, heldout = rewards
    made_of = {"reward": hashes(reward), **({"features": hashes(features)} if features is not None else {})}
    reward = in_dtype(reward, getattr(torch, config.reward_dtype))
    judges = {"reward": reward, **({"held-out": heldout} if heldout is not None else {})}
    evaluation = evaluation_of(policy, config.method, texts, judges, preview[1])
    present = (reward, features, None if offloads(config) else heldout)
    patchers = [p for judge in present if judge is not None for p in judge.patchers]
    policy.gradient_checkpointing(denoiser=config.gradient_checkpointing_denoiser, vae=True)  # `loaded` heeds it
    policy.slicing = config.vae_slicing
    with ExitStack() as stack:
        stack.enter_context(policy.loaded(patchers, config.batch_size))
        stack.enter_context(recomputing(reward, config.gradient_checkpointing_reward))
        evaluation.on_device = stack.enter_context(offloaded(config, (reward, features), heldout, evaluation.prompts, texts))
        parts = Parts(policy, samples, reward, None if features is None else features.reward, weights=made_of)
        run = Run.start(config, parts, resume=resumed)
        if run.step >= config.steps:
            raise ValueError(f"{run.folder.name} is at step {run.step} already: raise steps to go on")
        report = _run(run, evaluation, preview[0])
        metadata = run.metadata()
        return TrainedLora(lora_tensors(policy, run.ema.values if run.ema else None), metadata), metadata, evaluation, report


def train_in_graph(
    *,
    model: Any,
    vae: Any,
    reward: Any,
    prompts: str,
    objective: tuple[str, Any],
    settings: dict[str, Any],
    lora: Lora,
    name: str,
    resume: str,
    preview_every: int,
    preview_cfg: float,
    width: int,
    height: int,
    image_size: int,
    clip: Any = None,
    conditioning: Any = None,
    images: Tensor | None = None,
    heldout: Any = None,
    gradient_vae: Any = None,
    features: Any = None,
    memory: str = "fast",
    dataset: CaptionedFolder | None = None,
    pairs: PreferencePairs | None = None,
) -> io.NodeOutput:
    """Train, and return MODEL, LORA_MODEL, LOSS_MAP, curves, preview images, report."""
    data = training_data(prompts, images, dataset, (height, width), image_size, pairs, objective[1].data)
    check(data, objective[1], reward, features, clip)
    said = heldout_apart(objective[1], reward, heldout, resume != NEW)
    folder = run_folder(name, resume)
    same = _same(model, images, data, None if resume == NEW else folder)
    config = _config(folder, objective, reward, lora, {**settings, **same, "device": model.load_device.type})
    with outside_inference(), torch.enable_grad(), host.attention_with_gradient(), Warnings() as warnings:
        policy = ComfyPolicy(model, vae, _condition(clip, conditioning), _latent_shape(model, vae, data.size), gradient_vae)
        policy.add_lora(config.lora, config.seed, with_companions("tuned", config.method.companions))
        data.check(policy)
        if clip is not None:
            comfy.model_management.load_models_gpu([clip.patcher])
            for prompt in dict.fromkeys([*config.method.captions(data.texts), ""]):
                policy.prompts.prepare(prompt)
        preview, rewards = (preview_every, preview_cfg), (reward, features, heldout)
        config, fitted = _fitted_config(memory, config, policy, rewards, data, preview, resume != NEW)
        samples = data.samples(policy)  # before loading: encoding may push other models out of memory
        weights, metadata, evaluation, report = _trained(policy, config, samples, rewards, data.texts, preview, resume != NEW)
    log = logged(folder)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
    tuned.set_attachments(ATTACHMENT, metadata)
    shown = evaluation.images if evaluation.images is not None else torch.zeros(1, 3, 8, 8)
    return io.NodeOutput(
        tuned,
        weights,
        {"loss": log["loss"]},
        curves(log, evaluation),
        image(shown),
        report + fitted + warnings.report() + said + data.report(samples, vae, config.batch_size) + unheeded(model),
    )


def _same(model: Any, images: Tensor | None, data: TrainingData, resumed: Path | None) -> dict[str, Any]:
    """What a resumed run must share with the one that was stopped, though in a graph nothing of it has a name."""
    return {
        "model": f"graph: {_fingerprint(model, data.written)}",
        "images": "" if images is None else f"graph: {_fingerprint(None, images)}",
        **data.settings,
        **({} if resumed is None else {"seed": _resumed_seed(resumed, data)}),
    }


def _resumed_seed(folder: Path, data: TrainingData) -> int:
    """The seed of the run to resume: the browser draws another one after each run."""
    before = json.loads((folder / "config.json").read_text("utf-8"))
    key = data.listed_key if data.listed else "images"
    if (data.folder is not None or data.listed) and before[key] != data.settings[key]:
        if data.folder is None:
            raise ValueError(f"{folder.name} was trained on other pairs: connect those, or choose a new run")
        raise ValueError(
            f"{folder.name} was trained on other images or captions than {data.folder.name} has now: restore them, or choose a new run"
        )
    return before["seed"]


def _run(run: Run, evaluation: Evaluation, preview_every: int) -> str:
    """All steps of a run. Cancel and failures save the checkpoint, and raise."""
    management, begin, first = comfy.model_management, time.monotonic(), run.step
    device = evaluation.policy.device  # the model's, of several
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bar = comfy.utils.ProgressBar(run.config.steps)
    if preview_every:
        bar.update_absolute(first, run.config.steps, preview_of(evaluation, first))
    try:
        for done in steps_until(run, management.processing_interrupted):
            last = done.number == run.config.steps
            preview = preview_of(evaluation, done.number) if preview_every and (last or done.number % preview_every == 0) else None
            bar.update_absolute(done.number, run.config.steps, preview)
    except NonFinite:
        raise
    except BaseException:
        if run.step > first:
            run.save()
        raise
    management.throw_exception_if_processing_interrupted()
    seconds = time.monotonic() - begin
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    each = f" ({seconds / (run.step - first):.2f} s each)" if run.step > first else ""
    return f"{counted(run.step - first, 'steps')} in {seconds:.0f} s{each}{peak}; LoRA and state in {run.folder}"
