"""Metrics in a graph: diversity, and distances to real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.demo import files
from ..trainer.metrics.distances import frechet_distance, log_covariance_distance
from ..trainer.metrics.diversity import within_prompt_diversity
from .lists import by_size, places, prompts_of, unfit, usable
from .scoring import table
from .sockets import CATEGORY, schema, show_text

ClipVision = io.Custom("CLIP_VISION")
VISION = ClipVision.Input(
    "clip_vision",
    optional=True,
    tooltip="What looks at the images: any CLIP Vision model (CLIP, SigLIP, DINOv2). Not connected: the demo's extractor, which knows only "
    "the demo world.",
)


@torch.no_grad()
def features(images: Sequence[Tensor], clip_vision: Any) -> Tensor:
    """Images (3,H,W) in [0,1] of any sizes -> (N,D) on the CPU."""
    extractor = files.load_extractor() if clip_vision is None else None
    rows: dict[int, Tensor] = {}
    for same in by_size(images, 64):
        part = torch.stack([images[i] for i in same])
        if extractor is not None:
            found = extractor.features(part.cpu())
        else:  # ComfyUI brings the features to the CPU
            found = clip_vision.encode_image(part.movedim(1, -1), crop="center")["image_embeds"].float().cpu()
        rows.update(zip(same, found))
    return torch.stack([rows[i] for i in range(len(images))])


class Diversity(io.ComfyNode):
    """IMAGE -> FLOAT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDiversity",
            display_name="Image Diversity",
            search_aliases=["variety", "sameness", "mode collapse", "vendi"],
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
        every = prompts_of(prompts, images, per_line=True)
        finite_images, fit = usable(images)
        texts, without = [every[i] for i in places(fit)], unfit(fit, "is left out")
        distinct = list(dict.fromkeys(texts))
        alone = next((prompt for prompt in distinct if texts.count(prompt) < 2), None)
        if alone is not None:
            raise ValueError("; ".join([f"prompt {alone!r} has one image: diversity needs at least two", *without]))
        groups = torch.tensor([distinct.index(t) for t in texts])
        values = within_prompt_diversity(features(finite_images, clip_vision[0] if clip_vision else None), groups)
        text = table(("prompt", "images", "diversity"), [(p, texts.count(p), f"{v:.4f}") for p, v in zip(distinct, values.tolist())])
        shown = show_text(cls, "\n".join([f"diversity {values.mean():.4f}", *without]))
        return io.NodeOutput(float(values.mean()), text, ui=shown)


class Distance(io.ComfyNode):
    """IMAGE, IMAGE -> FID and LogCov distance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDistance",
            display_name="FID / LogCov Distance",
            search_aliases=["frechet inception distance", "compare image sets"],
            category=f"{CATEGORY}/judging",
            description="How far a batch of images is from another, in the features of a vision model: FID (Fréchet) and the distance "
            "of log covariances. A list of batches counts as one. Comparable only between as many images, seen by the same vision model.",
            is_input_list=True,
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
    def execute(cls, images: list[Tensor], reference: list[Tensor], clip_vision: list[Any] | None = None) -> io.NodeOutput:
        """Measure."""
        (own, fit), (real, real_fit) = usable(images), usable(reference)
        ours, theirs = (features(part, clip_vision[0] if clip_vision else None) for part in (own, real))
        fid, logcov = frechet_distance(ours, theirs), log_covariance_distance(ours, theirs)
        lines = [f"FID {fid:.3f}, LogCov {logcov:.3f}, {len(ours)} images against {len(theirs)}"]
        lines += unfit(fit, "is left out") + [f"reference {line}" for line in unfit(real_fit, "is left out")]
        return io.NodeOutput(fid, logcov, ui=show_text(cls, "\n".join(lines)))


NODES = [Diversity, Distance]
