"""A training run over a ComfyUI model: the headless trainer's run, with progress, preview and Cancel."""

from __future__ import annotations

import hashlib
import json
import re
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
from ..trainer.data.batches import Prompts
from ..trainer.data.images import grid, to_pil
from ..trainer.data.samples import Samples, encode_images
from ..trainer.generate import Generation
from ..trainer.guidance import Switch
from ..trainer.lora.file import lora_tensors
from ..trainer.memory.offload import offloads
from ..trainer.policy import Lora
from ..trainer.training.config import TrainConfig, Watch
from ..trainer.training.console import steps_until
from ..trainer.training.evaluation import Evaluation
from ..trainer.training.loop import NonFinite
from ..trainer.training.parts import Parts
from ..trainer.training.run import Run
from .lists import prompt_per_image
from .lora import TrainedLora, runs_folder
from .memory import GraphPlanner, kept_settings, offloaded, recomputing, settings_that_fit
from .policy import ComfyPolicy
from .rewards import hashes, in_dtype
from .sockets import figure, image, pixels
from .switch import ATTACHMENT

Rewards = tuple[Any, Any, Any]
"""What is trained on, features, and the held-out one; the last two may be None."""
Preview = tuple[int, float]
"""Steps between previews, and their guidance scale."""
NEW, LAST = "a new run", "the last run of this name"


def resumable() -> list[str]:
    """Runs that have a checkpoint, newest first."""
    found = sorted(runs_folder().glob("*/checkpoint.pt"), key=lambda p: -p.stat().st_mtime)
    return [p.parent.name for p in found]


def run_folder(name: str, resume: str) -> Path:
    """The folder of the run to resume, or one that no run has used: name, name_2, name_3, …"""
    plain_name = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ") or "run"
    if resume == NEW:
        number = 1
        while (folder := runs_folder() / (plain_name if number == 1 else f"{plain_name}_{number}")).exists():
            number += 1
        return folder
    runs = resumable()
    found = [run for run in runs if run == resume or (resume == LAST and re.fullmatch(rf"{re.escape(plain_name)}(_\d+)?", run))]
    if not found:
        wanted = f"named {plain_name!r}" if resume == LAST else repr(resume)
        raise ValueError(f"no run {wanted} to resume: choose one of {', '.join(runs) or 'none yet'}")
    return runs_folder() / found[0]


def _evaluation(policy: ComfyPolicy, objective: Any, prompts: Sequence[str], rewards: dict[str, Any], guidance_scale: float) -> Evaluation:
    """Previews and their rewards: two images of each of the first four prompts, by combined generation."""
    switch = Switch(sigma=objective.recommended_sigma(policy.sigmas(objective.steps)))
    generation = Generation(steps=objective.steps, guidance_scale=guidance_scale, seed=0, chunk=4)
    return Evaluation(policy, rewards, [p for p in dict.fromkeys(prompts) if p][:4] * 2, generation, switch)


def _preview(evaluation: Evaluation, step: int) -> tuple[str, Any, int]:
    """Evaluate, and return the images as ComfyUI's progress bar takes them."""
    evaluation.run(step)
    assert evaluation.images is not None
    return "JPEG", to_pil(grid(evaluation.images, 4)), 512


def _curves(rewards: Sequence[float], evaluation: Evaluation) -> Tensor:
    """Training reward of every step, and the mean rewards of the previews, as IMAGE."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    panel = drawn.subplots()
    panel.plot(range(1, len(rewards) + 1), rewards, color="#bbbbbb", label="training batch")
    for name in evaluation.rewards:
        steps, values = [p["step"] for p in evaluation.points], [p[name] for p in evaluation.points]
        panel.plot(steps, values, marker="o", label=f"{name}, combined generation")
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("reward, standard deviations of base images")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure(drawn)


def _samples(policy: ComfyPolicy, prompts: list[str], images: Tensor | None) -> Samples:
    if images is None:
        return Samples(tuple(prompts))
    return encode_images(policy, images, prompt_per_image(prompts, len(images)), chunk=4)


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


def _condition(clip: Any, conditioning: Any) -> Any:
    """How a prompt becomes CONDITIONING: by the CLIP, or the given one whatever the prompt."""
    if clip is not None:
        return lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    if conditioning is not None:
        return lambda prompt: conditioning
    raise ValueError("connect a clip, which encodes each prompt, or a conditioning, which stands for all of them")


def _fitted(images: Tensor, size: int) -> Tensor:
    """Images (B,3,H,W) scaled to `size` pixels on the shorter side, centre cropped to a multiple of 8 as the VAE needs."""
    height, width = images.shape[2:]
    if size:
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = torch.nn.functional.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        height = width = size
    tall, wide = height // 8 * 8, width // 8 * 8
    top, left = (images.shape[2] - tall) // 2, (images.shape[3] - wide) // 2
    return images[:, :, top : top + tall, left : left + wide]


def _check(texts: Sequence[str], objective: Any, reward: Any, features: Any, images: Tensor | None) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    if not texts:
        raise ValueError("no prompt: write one per line, the caption of each image where images are connected")
    if features is not None and not getattr(features, "takes_prefixes", False):
        raise ValueError("features: only a two-tower reward (HPS, PickScore, CLIP) has features of images and texts")
    if objective.needs_gradient and not reward.differentiable:
        raise ValueError(
            f"reward {reward.name} has no gradient: training needs one that has (a two-tower one, say), or the black-box objective"
        )
    if images is None and objective.data is not Prompts:
        raise ValueError(
            f"{type(objective).__name__} trains on real images as it is set: connect some, or choose settings that start from noise"
        )


def _latent_shape(model: Any, vae: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C,h,w) of an image of (height, width) pixels."""
    ratio = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
    return model.get_model_object("latent_format").latent_channels, size[0] // ratio, size[1] // ratio


def _logged(folder: Path) -> tuple[list[float], list[float]]:
    """Loss and reward of every step of a run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in log], [line["reward"] for line in log]


def _config(folder: Path, objective: tuple[str, Any], reward: Any, lora: Lora, settings: dict[str, Any]) -> TrainConfig:
    """The config that a headless run of this graph would have, as far as no memory mode changes it."""
    settings = {"offload_encoders": False, "gradient_checkpointing_vae": True, **settings}
    table = {"name": objective[0], **plain(objective[1])}
    return build(TrainConfig, {**settings, "out": str(folder), "objective": table, "reward": reward.name, "lora": plain(lora)})


def _fitted_config(
    memory: str, config: TrainConfig, policy: ComfyPolicy, rewards: Rewards, texts: list[str], preview: Preview, resumed: bool
) -> tuple[TrainConfig, str]:
    """The config with the memory settings of a mode, or of the run that is resumed, and what the report says of them."""
    if resumed:
        return kept_settings(memory, config, policy)
    every, guidance_scale = preview
    watch = Watch(every, count=min(4, len(dict.fromkeys(texts))), images=2, guidance_scale=guidance_scale)
    return settings_that_fit(memory, config, policy, lambda: GraphPlanner(policy, rewards, len({*texts, ""}), watch))


def _trained(
    policy: ComfyPolicy, config: TrainConfig, samples: Samples, rewards: Rewards, texts: list[str], preview: Preview, resumed: bool
) -> tuple[TrainedLora, dict[str, Any], Evaluation, str]:
    """Train from the start or from the checkpoint: the LoRA, its metadata, the previews and the report."""
    reward, features, heldout = rewards
    made_of = {"reward": hashes(reward), **({"features": hashes(features)} if features is not None else {})}
    reward = in_dtype(reward, getattr(torch, config.reward_dtype))
    judges = {"reward": reward, **({"held-out": heldout} if heldout is not None else {})}
    evaluation = _evaluation(policy, config.method, texts, judges, preview[1])
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
) -> io.NodeOutput:
    """Train, and return MODEL, LORA_MODEL, LOSS_MAP, curves, preview images, report."""
    texts = [line.strip() for line in prompts.splitlines() if line.strip()]
    _check(texts, objective[1], reward, features, images)
    folder = run_folder(name, resume)
    if resume != NEW:  # the browser draws another seed after each run
        settings = {**settings, "seed": json.loads((folder / "config.json").read_text("utf-8"))["seed"]}
    # what a resumed run must share with the one that was stopped, though in a graph nothing of it has a name
    same = {"model": f"graph: {_fingerprint(model, texts)}", "images": "" if images is None else f"graph: {_fingerprint(None, images)}"}
    config = _config(folder, objective, reward, lora, {**settings, **same, "device": model.load_device.type})
    with torch.inference_mode(False), torch.enable_grad():
        real = None if images is None else _fitted(pixels(images).clone(), image_size)
        size = (height, width) if real is None else (int(real.shape[2]), int(real.shape[3]))
        policy = ComfyPolicy(model, vae, _condition(clip, conditioning), _latent_shape(model, vae, size), gradient_vae)
        policy.add_lora(config.lora, config.seed)
        if clip is not None:
            comfy.model_management.load_models_gpu([clip.patcher])
            for prompt in dict.fromkeys([*texts, ""]):
                policy.prompts.prepare(prompt)
        preview, rewards = (preview_every, preview_cfg), (reward, features, heldout)
        config, fitted = _fitted_config(memory, config, policy, rewards, texts, preview, resume != NEW)
        samples = _samples(policy, texts, real)  # before loading: encoding may push other models out of memory
        weights, metadata, evaluation, report = _trained(policy, config, samples, rewards, texts, preview, resume != NEW)
    losses, scores = _logged(folder)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
    tuned.set_attachments(ATTACHMENT, metadata)
    shown = evaluation.images if evaluation.images is not None else torch.zeros(1, 3, 8, 8)
    return io.NodeOutput(tuned, weights, {"loss": losses}, _curves(scores, evaluation), image(shown), report + fitted)


def _run(run: Run, evaluation: Evaluation, preview_every: int) -> str:
    """All steps of a run. Cancel and failures save the checkpoint, and raise."""
    management, begin, first = comfy.model_management, time.monotonic(), run.step
    device = evaluation.policy.device  # the model's, of several
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bar = comfy.utils.ProgressBar(run.config.steps)
    if preview_every:
        bar.update_absolute(first, run.config.steps, _preview(evaluation, first))
    try:
        for done in steps_until(run, management.processing_interrupted):
            last = done.number == run.config.steps
            preview = _preview(evaluation, done.number) if preview_every and (last or done.number % preview_every == 0) else None
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
    return f"{run.step - first} steps in {seconds:.0f} s{each}{peak}; LoRA and state in {run.folder}"
