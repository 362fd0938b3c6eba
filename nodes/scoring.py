"""Scoring in a graph: score images, keep the best, and write a score into the image's file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from PIL.PngImagePlugin import PngInfo

from ..trainer.data.images import to_pil
from .rewards import Loaded
from .sockets import CATEGORY, Reward, pixels, schema, show_text


def prompt_per_image(prompts: Sequence[str], n: int) -> list[str]:
    """One prompt for all images, or one each."""
    if len(prompts) == 1:
        return list(prompts) * n
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} images: give one prompt, or one per image")
    return list(prompts)


@torch.no_grad()
def score(reward: Any, images: torch.Tensor, prompts: Sequence[str], chunk: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw and normalised scores (N,), on the CPU."""
    with torch.inference_mode(False):  # moving a network inside inference mode would unfit it for training later
        reward.to_device()
    device = comfy.model_management.get_torch_device() if reward.patchers else images.device
    raw: list[torch.Tensor] = []
    scaled: list[torch.Tensor] = []
    with torch.inference_mode(False):
        for first in range(0, len(images), chunk):
            comfy.model_management.throw_exception_if_processing_interrupted()
            part, texts = images[first : first + chunk].clone().to(device), prompts[first : first + chunk]
            own = reward.raw(part, texts)
            raw.append(own.float().cpu())
            # a sum of standardised parts cannot be had from the sum of raw ones
            scaled.append((reward.scaled(own) if isinstance(reward, Loaded) else reward(part, texts)).float().cpu())
    return torch.cat(raw), torch.cat(scaled)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


class RewardScorer(io.ComfyNode):
    """IMAGE, prompts, REWARD_MODEL -> scores."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLScore",
            display_name="Reward Scorer",
            category=f"{CATEGORY}/rewards",
            description="Scores every image under its prompt.",
            search_aliases=["rate images", "aesthetic score"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images, as one batch or a list of batches."),
                Reward.Input("reward", tooltip="What scores them."),
                io.String.Input("prompt", multiline=True, tooltip="One prompt for all images, or a list with one per image."),
                io.Boolean.Input(
                    "prompt_per_line", default=False, tooltip="Read each line of the prompt as the prompt of one image, in their order."
                ),
            ],
            outputs=[
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="Per image, in standard deviations."),
                io.Float.Output("raw", display_name="raw", is_output_list=True, tooltip="Per image, on the model's own scale."),
                io.String.Output("table", display_name="table", tooltip="Both, as a table."),
                io.Float.Output("mean", display_name="mean", tooltip="Mean of the scores."),
            ],
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], reward: list[Any], prompt: list[str], prompt_per_line: list[bool]) -> io.NodeOutput:
        """Score."""
        batch = torch.cat([pixels(part) for part in images])
        lines = [line for text in prompt for line in (text.splitlines() if prompt_per_line[0] else [text]) if line.strip()]
        texts = prompt_per_image(lines or [""], len(batch))
        raw, scaled = score(reward[0], batch, texts)
        rows = [(i, f"{z:.4f}", f"{r:.4f}", text) for i, (z, r, text) in enumerate(zip(scaled.tolist(), raw.tolist(), texts))]
        text = table(("image", "z", "raw", "prompt"), rows)
        lines = [f"mean {scaled.mean():.3f}", *(f"image {i}: {z:.3f}" for i, z in enumerate(scaled[:16].tolist()))]
        shown = show_text(cls, "\n".join(lines))
        return io.NodeOutput(scaled.tolist(), raw.tolist(), text, float(scaled.mean()), ui=shown)


def best(scores: Sequence[float], k: int, threshold: float | None) -> list[int]:
    """Indices of the k highest scores that reach the threshold, best first; equal scores keep their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [i for i in order[:k] if threshold is None or scores[i] >= threshold]


class PickBest(io.ComfyNode):
    """IMAGE, scores, LATENT -> the best of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLPickBest",
            display_name="Pick Best",
            category=f"{CATEGORY}/rewards",
            description="Keeps the images with the highest scores, and their latents.",
            search_aliases=["best of n", "top k"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The images that were scored."),
                io.Float.Input("scores", force_input=True, tooltip="The Reward Scorer's scores, one per image."),
                io.Int.Input("k", default=1, min=1, max=4096, tooltip="How many to keep."),
                io.Latent.Input("latents", optional=True, tooltip="The latents that the images were decoded from, to keep with them."),
                io.Float.Input(
                    "threshold", optional=True, force_input=True, tooltip="Drop images below this score. Not connected: none is dropped."
                ),
            ],
            outputs=[
                io.Image.Output("best_images", display_name="IMAGE", tooltip="Best first."),
                io.Latent.Output("best_latents", display_name="LATENT", tooltip="Theirs, in the same order; empty if none were given."),
                io.Int.Output("best_indices", display_name="indices", is_output_list=True, tooltip="Where they stood, from 0."),
                io.Float.Output("best_scores", display_name="scores", is_output_list=True, tooltip="Their scores."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        scores: list[float],
        k: list[int],
        latents: list[dict[str, Any]] | None = None,
        threshold: list[float] | None = None,
    ) -> io.NodeOutput:
        """Pick."""
        batch = torch.cat(images)
        if len(scores) != len(batch):
            raise ValueError(f"{len(scores)} scores for {len(batch)} images: connect the scorer that saw these images")
        chosen = best(scores, k[0], threshold[0] if threshold else None)
        if not chosen:
            raise ValueError(f"no image reaches {threshold[0] if threshold else 0:g}; the best score is {max(scores):.4f}")
        return io.NodeOutput(batch[chosen], _rows(latents, len(batch), chosen), chosen, [scores[i] for i in chosen])


def _rows(latents: list[dict[str, Any]] | None, n: int, chosen: list[int]) -> dict[str, Any] | None:
    """The latents of chosen images, with their masks and batch indices."""
    if not latents:
        return None
    samples = torch.cat([part["samples"] for part in latents])
    if len(samples) != n:
        raise ValueError(f"{len(samples)} latents for {n} images: connect the latents that these images were decoded from")
    kept: dict[str, Any] = {"samples": samples[chosen]}
    counts = [len(part["samples"]) for part in latents]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    numbers = [part.get("batch_index", range(start, start + count)) for part, start, count in zip(latents, starts, counts)]
    kept["batch_index"] = [[i for group in numbers for i in group][row] for row in chosen]
    if all("noise_mask" in part for part in latents):
        masks = [part["noise_mask"].expand(count, *part["noise_mask"].shape[1:]) for part, count in zip(latents, counts)]
        kept["noise_mask"] = torch.cat(masks)[chosen]
    return kept


class SaveScored(io.ComfyNode):
    """IMAGE, scores -> files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSaveScored",
            display_name="Save Image with Score",
            category=f"{CATEGORY}/rewards",
            description="Saves PNG files that carry their score, beside the workflow that made them.",
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Image.Input("images", tooltip="What to save."),
                io.Float.Input("scores", force_input=True, tooltip="One per image."),
                io.String.Input(
                    "filename_prefix", default="ImageReFL", tooltip="Below the output folder; %date% and the like are filled in."
                ),
                io.String.Input("reward_name", default="reward", tooltip="Whose score it is: the key in the file."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], scores: list[float], filename_prefix: list[str], reward_name: list[str]) -> io.NodeOutput:
        """Save."""
        from comfy.cli_args import args

        batch = torch.cat([pixels(part) for part in images])
        if len(scores) != len(batch):
            raise ValueError(f"{len(scores)} scores for {len(batch)} images: connect the scorer that saw these images")
        height, width = batch.shape[2:]
        place = folder_paths.get_save_image_path(filename_prefix[0], folder_paths.get_output_directory(), width, height)
        folder, filename, counter, subfolder, _ = place
        saved: list[dict[str, str]] = []
        for i, (one, value) in enumerate(zip(batch, scores)):
            info = PngInfo()
            info.add_text("score", json.dumps({reward_name[0]: value}))
            if not args.disable_metadata:
                if cls.hidden.prompt is not None:
                    info.add_text("prompt", json.dumps(_first(cls.hidden.prompt)))
                for key, text in (_first(cls.hidden.extra_pnginfo) or {}).items():
                    info.add_text(key, json.dumps(text))
            name = f"{filename.replace('%batch_num%', str(i))}_{counter + i:05}_.png"
            to_pil(one).save(Path(folder) / name, pnginfo=info)
            saved.append({"filename": name, "subfolder": subfolder, "type": "output"})
        return io.NodeOutput(ui={"images": saved})


def _first(value: Any) -> Any:
    """A hidden input, which list nodes may get wrapped in a list."""
    return value[0] if isinstance(value, list) and value else value


NODES = [RewardScorer, PickBest, SaveScored]
