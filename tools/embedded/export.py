"""The trained stages as the files that the package ships, with a manifest."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.demo import architecture, experiment, files, world
from trainer.demo.architecture import TOWERS, vocabulary_size
from trainer.generate import generate
from trainer.guidance import cfg
from trainer.runtime.files import file_hash

from .extractor import centred
from .fit import LATENT_NOISE, TextToLatent, load_stage
from .preference import TowerWithHeads

log = logging.getLogger(__name__)


def export(work: Path, seed: int, steps: int, **_: object) -> None:
    """Write the stages that `work` has trained as the files that the package ships, with a manifest; the other files stay."""
    if (work / "unet.pt").is_file():
        _export_pipeline(work)
    if (work / "reader.pt").is_file():
        save_half(load_stage(work, "reader", architecture.Reader()), files.FOLDER / "reader.safetensors")
    if (work / "extractor.pt").is_file():
        save_half(centred(work), files.FOLDER / "extractor.safetensors")
    for name in TOWERS:
        if (work / f"tower_{name}.pt").is_file():
            tower = load_stage(work, f"tower_{name}", TowerWithHeads(name)).tower
            write_tower(files.FOLDER / name, tower, TOWERS[name], 0.0, 1.0, work / "tokenizer")
            mean, std = _reward_statistics(name, seed)
            path = files.FOLDER / name / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "mean": mean, "std": std}, indent=1) + "\n", "utf-8")
    _write_manifest(work, seed)


def _export_pipeline(work: Path) -> None:
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    scale = float(torch.load(work / "latents.pt", weights_only=True)["scale"])
    vae = load_stage(work, "decoder", architecture.build_vae())
    _fold_scale(vae, scale / architecture.LATENT_SCALE)
    networks = load_stage(work, "unet", TextToLatent())
    build: Any = StableDiffusionPipeline
    pipeline = build(
        vae=vae,
        text_encoder=networks.text,
        tokenizer=architecture.load_tokenizer(work / "tokenizer"),
        unet=networks.unet,
        scheduler=architecture.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(files.PIPELINE)


def _write_manifest(work: Path, seed: int) -> None:
    """Steps and last losses of every stage, those of `work` renewed, and the hashes of all files."""
    path = files.FOLDER / "manifest.json"
    stages = json.loads(path.read_text("utf-8"))["stages"] if path.is_file() else {}
    for log_path in sorted(work.glob("*.jsonl")):
        lines = [json.loads(line) for line in log_path.read_text().splitlines()]
        stages[log_path.stem] = {"steps": lines[-1]["step"], "loss": round(lines[-1]["loss"], 5)}
    hashes = {str(p.relative_to(files.FOLDER)): file_hash(p) for p in sorted(files.FOLDER.rglob("*.safetensors"))}
    path.write_text(json.dumps({"seed": seed, "stages": stages, "sha256": hashes}, indent=1) + "\n", "utf-8")
    log.info("%.2f MB of safetensors", sum(p.stat().st_size for p in files.FOLDER.rglob("*.safetensors")) / 1e6)


@torch.no_grad()
def _fold_scale(vae: Any, factor: float) -> None:
    """Multiply the latents by `factor` inside the weights, and give the posterior its fixed width."""
    vae.quant_conv.weight[:4].mul_(factor)
    vae.quant_conv.bias[:4].mul_(factor)
    vae.quant_conv.weight[4:].zero_()
    vae.quant_conv.bias[4:].fill_(2 * math.log(LATENT_NOISE / architecture.LATENT_SCALE))
    vae.post_quant_conv.weight.div_(factor)


def _reward_statistics(name: str, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of a tower's raw scores over base samples: what a reward's unit is."""
    prompts = [c.text for c in world.captions(256, "statistics", seed)]
    settings = experiment.generation(seed + 99)
    images = generate(experiment.load_base(), prompts, settings, {"": cfg(settings.base)})[""]
    values = files.load_reward(name, standardise=False)(images, prompts)
    return float(values.mean()), float(values.std())


def write_tower(folder: Path, tower: nn.Module, config: Mapping[str, Any], mean: float, std: float, words: Path) -> None:
    """A reward folder as `TwoTower.load` reads it, of a tower of this configuration; `words` is a folder that `write_tokenizer` filled."""
    folder.mkdir(parents=True, exist_ok=True)
    state = _half(tower)
    save_file({k: v for k, v in state.items() if k != "attn_mask"}, folder / "model.safetensors")
    scale = float(state["logit_scale"].float().exp())
    sized = {**config, "text_cfg": {**config["text_cfg"], "vocab_size": vocabulary_size()}}
    described = {**sized, "scale": scale, "mean": mean, "std": std}
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", "utf-8")
    (folder / "merges.txt.gz").write_bytes((words / "merges.txt.gz").read_bytes())


def save_half(module: nn.Module, path: Path) -> None:
    """A module's state in fp16 safetensors."""
    save_file(_half(module), path)


def _half(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in module.state_dict().items()}


def save_half_lora(source: Path, path: Path) -> None:
    """A LoRA file in fp16, with the same header; its hash goes into the manifest."""
    with safe_open(source, framework="pt") as file:
        tensors, header = {k: file.get_tensor(k).half() for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    renew_hash(path)


def renew_hash(path: Path) -> None:
    """Write the hash of one shipped file into the manifest."""
    manifest = json.loads((files.FOLDER / "manifest.json").read_text("utf-8"))
    manifest["sha256"][str(path.relative_to(files.FOLDER))] = file_hash(path)
    manifest["sha256"] = dict(sorted(manifest["sha256"].items()))
    (files.FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
