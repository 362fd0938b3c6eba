"""Metrics in a graph: diversity, and distances to real images."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.demo import files
from ..trainer.metrics.distances import frechet_distance, log_covariance_distance
from ..trainer.metrics.diversity import within_prompt_diversity
from .scoring import prompt_per_image, table
from .sockets import CATEGORY, pixels, schema, show_text

ClipVision = io.Custom("CLIP_VISION")
VISION = ClipVision.Input(
    "clip_vision",
    optional=True,
    tooltip="What looks at the images: any CLIP Vision model (CLIP, SigLIP, DINOv2). Not connected: the demo's extractor, which knows only "
    "the demo world.",
)


@torch.no_grad()
def features(images: Tensor, clip_vision: Any) -> Tensor:
    """(N,3,H,W) in [0,1] -> (N,D)."""
    if clip_vision is not None:
        parts = [clip_vision.encode_image(part.movedim(1, -1), crop="center")["image_embeds"] for part in images.split(64)]
        return torch.cat([part.float().cpu() for part in parts])
    extractor = files.load_extractor()
    return torch.cat([extractor.features(part) for part in images.cpu().split(64)])


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
                VISION,
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
        return io.NodeOutput(float(values.mean()), text, ui=show_text(cls, f"diversity {values.mean():.4f}"))


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
                VISION,
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
        return io.NodeOutput(fid, logcov, ui=show_text(cls, text))


NODES = [Diversity, Distance]
