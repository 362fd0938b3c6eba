"""SDXL: a UNet that is also told the pooled text embedding and the image's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .diffusers_policy import Conditioning
from .unet import UNetPolicy


class SDXLPolicy(UNetPolicy):
    """A diffusers SDXL pipeline as a trainer.policy.Policy.

    Size conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2) says what the pipeline says by default: an
    image of the size that is drawn, uncropped. Guidance takes zeros for no prompt where the pipeline's configuration
    asks for it (`force_zeros_for_empty_prompt`, as SDXL base); set `zero_unconditional` to False to encode "" instead,
    as ComfyUI and the official ImageReFL code do.
    """

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(pipeline, device, dtype, image_size)
        self.zero_unconditional: bool = bool(pipeline.config.force_zeros_for_empty_prompt)

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        from diffusers import StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]

        return StableDiffusionXLPipeline

    @classmethod
    def load_arguments(cls) -> dict[str, Any]:
        """What of the pipeline is not needed."""
        return {"add_watermarker": False}

    def _encode_prompts(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def unconditional(self, n: int) -> Conditioning:
        """What the network is told of no prompt, n times."""
        empty = super().unconditional(n)
        return {key: torch.zeros_like(value) for key, value in empty.items()} if self.zero_unconditional else empty

    def _network_arguments(self, x: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = x.shape[-2] * factor, x.shape[-1] * factor
        text = conditioning["encoder_hidden_states"]
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=self.device)  # size, crop, target
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": ids.expand(len(x), -1)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
