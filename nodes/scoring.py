"""Scoring in a graph: score images, keep the best, and write a score into the image's file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL.PngImagePlugin import PngInfo

from ..trainer.data.images import to_pil
from .autograd import outside_inference
from .lists import batched, by_size, finite, latent_per_image, places, prompts_of, separate, unfit, usable
from .rewards import Loaded
from .sockets import CATEGORY, Reward, schema, show_text


@torch.no_grad()
def score(reward: Any, images: Sequence[torch.Tensor], prompts: Sequence[str], chunk: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (3,H,W) in [0,1] of any sizes, a prompt each -> raw and normalised scores (N,), on the CPU."""
    with outside_inference():  # a reward may keep features of texts, and training meets them again
        reward.to_device()
        raw, scaled = torch.full((2, len(images)), torch.nan)
        for rows in by_size(images, chunk):  # reading scores waits for the GPU, once per chunk, between which Cancel is heeded
            comfy.model_management.throw_exception_if_processing_interrupted()
            part, texts = torch.stack([images[i] for i in rows]), [prompts[i] for i in rows]
            own = reward.raw(part, texts)
            raw[rows] = own.float().cpu()
            # a sum of standardised parts cannot be had from the sum of raw ones
            scaled[rows] = (reward.scaled(own) if isinstance(reward, Loaded) else reward(part, texts)).float().cpu()
    return raw, scaled


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
            search_aliases=["rate images", "aesthetic score", "hpsv2", "pickscore", "best image"],
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
        texts = prompts_of(prompt, images, prompt_per_line[0])
        finite_images, fit = usable(images)
        raw, scaled = torch.full((2, len(texts)), torch.nan)
        raw[places(fit)], scaled[places(fit)] = score(reward[0], finite_images, [texts[i] for i in places(fit)])
        if not bool(scaled.isfinite().any()):
            raise ValueError(f"reward {reward[0].name!r} gives no image a finite score: connect another")
        mean = float(scaled[scaled.isfinite()].mean())
        values = list(zip(scaled.tolist(), raw.tolist(), texts))
        text = table(("image", "z", "raw", "prompt"), [(i, f"{z:.4f}", f"{r:.4f}", text) for i, (z, r, text) in enumerate(values)])
        lines = [f"mean {mean:.3f}", *unfit(fit, "ranks last", scaled.tolist())]
        lines += [f"image {i}: {z:.3f}" for i, (z, _, _) in enumerate(values[:16]) if math.isfinite(z)]
        return io.NodeOutput(scaled.tolist(), raw.tolist(), text, mean, ui=show_text(cls, "\n".join(lines)))


def best(scores: Sequence[float], k: int, threshold: float | None) -> list[int]:
    """Indices of the k highest finite scores that reach the threshold, best first; equal scores keep their order."""
    order = sorted((i for i, value in enumerate(scores) if math.isfinite(value)), key=lambda i: -scores[i])
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
            search_aliases=["best of n", "top k", "best image", "rank images"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
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
                io.Image.Output(
                    "best_images", display_name="IMAGE", is_output_list=True, tooltip="Best first: a batch, or a list if sizes differ."
                ),
                io.Latent.Output(
                    "best_latents", display_name="LATENT", is_output_list=True, tooltip="Theirs, in the same order; needs latents."
                ),
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
        each, fit = separate(images), finite(images)
        if len(scores) != len(each):
            raise ValueError(f"{len(scores)} scores for {len(each)} images: connect the scorer that saw these images")
        ranked = [value if ok else math.nan for value, ok in zip(scores, fit)]
        chosen = best(ranked, k[0], threshold[0] if threshold else None)
        if not any(map(math.isfinite, ranked)):
            raise ValueError(f"none of {len(each)} images is finite and has a finite score: look at the node that made them")
        if not chosen:
            highest = max(filter(math.isfinite, ranked))
            raise ValueError(f"no image reaches {threshold[0] if threshold else 0:g}; the best score is {highest:.4f}")
        rows = latent_per_image(latents, len(each)) if latents else None
        picked, kept = batched([each[i] for i in chosen], [rows[i] for i in chosen] if rows else None)
        lines = [f"image {i}: {scores[i]:.3f}" for i in chosen[:16]] + unfit(fit, "ranks last", scores)
        # other outputs are of use without latents: only what is connected to this one stops, and says so
        blocked = ExecutionBlocker("Pick Best has no latents: connect the latents that its images were decoded from")
        shown = show_text(cls, "\n".join(lines))
        return io.NodeOutput(picked, kept or blocked, chosen, [scores[i] for i in chosen], ui=shown)


class SaveScored(io.ComfyNode):
    """IMAGE, scores -> files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSaveScored",
            display_name="Save Image with Score",
            search_aliases=["save best image", "score in metadata"],
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
        finite_images, fit = usable(images)
        if len(scores) != len(fit):
            raise ValueError(f"{len(scores)} scores for {len(fit)} images: connect the scorer that saw these images")
        named: dict[tuple[int, int], tuple[str, str, str]] = {}  # %width% and %height% may be part of the name
        counters: dict[tuple[str, str], int] = {}
        saved: list[dict[str, str]] = []
        for i, one in zip(places(fit), finite_images):
            height, width = one.shape[1:]
            if (width, height) not in named:
                found = folder_paths.get_save_image_path(filename_prefix[0], folder_paths.get_output_directory(), width, height)
                folder, filename, counter, subfolder, _ = found
                named[width, height] = folder, filename, subfolder
                counters.setdefault((folder, filename), counter)
            folder, filename, subfolder = named[width, height]
            name = f"{filename.replace('%batch_num%', str(i))}_{counters[folder, filename]:05}_.png"
            counters[folder, filename] += 1
            to_pil(one).save(Path(folder) / name, pnginfo=cls._info(reward_name[0], scores[i]))
            saved.append({"filename": name, "subfolder": subfolder, "type": "output"})
        lines = unfit(fit, "is not saved")
        return io.NodeOutput(ui={"images": saved, **(show_text(cls, "\n".join(lines)).as_dict() if lines else {})})

    @classmethod
    def _info(cls, reward: str, score: float) -> PngInfo:
        """What the file says: the score, and the workflow unless ComfyUI leaves it out."""
        from comfy.cli_args import args

        info = PngInfo()
        info.add_text("score", json.dumps({reward: score if math.isfinite(score) else None}))
        if not args.disable_metadata:
            if cls.hidden.prompt is not None:
                info.add_text("prompt", json.dumps(_first(cls.hidden.prompt)))
            for key, text in (_first(cls.hidden.extra_pnginfo) or {}).items():
                info.add_text(key, json.dumps(text))
        return info


def _first(value: Any) -> Any:
    """A hidden input, which list nodes may get wrapped in a list."""
    return value[0] if isinstance(value, list) and value else value


NODES = [RewardScorer, PickBest, SaveScored]
