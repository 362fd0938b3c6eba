"""The proxy prompt of CHATS: an embedding on the far side of the negative from the prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .sockets import CATEGORY, schema

_CHUNK = 77  # tokens of a chunk of CLIP's
_MASKS = ("attention_mask", "attention_mask_img_shape")  # what tells padding from a prompt's own tokens


def proxy_prompt(positive: Any, negative: Any, strength: float) -> Any:
    """CONDITIONING of (1 + strength)·negative − strength·positive, token embeddings and pooled ones (arXiv:2502.12579).

    Of CLIP's embeddings, which are chunks of 77 tokens, the shorter one is repeated, as ComfyUI does when it evaluates both together.
    Everything else is the positive's: areas, masks, ControlNets. Raises ValueError where the two cannot be added.
    """
    if len(negative) != 1:
        raise ValueError(f"the negative of a proxy prompt has {len(negative)} parts: connect one prompt")
    return [[*_far_side(one, negative[0], strength)] for one in positive]


def _far_side(positive: Any, negative: Any, strength: float) -> tuple[torch.Tensor, dict[str, Any]]:
    (prompt, about), (empty, of_empty) = positive, negative
    if any(mask in given for mask in _MASKS for given in (about, of_empty)):
        raise ValueError("this model masks the padding of its prompts, so that two prompts have no sum: a proxy prompt is for CLIP and T5")
    prompt, empty = _of_one_length(prompt, empty)
    made = {**about}
    pooled = about.get("pooled_output"), of_empty.get("pooled_output")
    if (pooled[0] is None) != (pooled[1] is None):
        raise ValueError("one of positive and negative has a pooled embedding, the other has none: encode both with one CLIP")
    if pooled[0] is not None and pooled[1] is not None:
        made["pooled_output"] = (1 + strength) * pooled[1] - strength * pooled[0]
    return (1 + strength) * empty - strength * prompt, made


def _of_one_length(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, chunked = max(a.shape[1], b.shape[1]), a.shape[1] % _CHUNK == b.shape[1] % _CHUNK == 0
    if a.shape[2:] != b.shape[2:] or (a.shape[1] != b.shape[1] and not (chunked and length % a.shape[1] == length % b.shape[1] == 0)):
        raise ValueError(
            f"positive and negative embeddings {tuple(a.shape[1:])} and {tuple(b.shape[1:])} have no sum: "
            "a proxy prompt needs equal lengths, as T5's are, or chunks of 77 tokens, one length a multiple of the other, as CLIP's are"
        )
    return a.repeat(1, length // a.shape[1], 1), b.repeat(1, length // b.shape[1], 1)


class ProxyPrompt(io.ComfyNode):
    """CONDITIONING + CONDITIONING -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLProxyPrompt",
            display_name="Proxy Prompt",
            category=f"{CATEGORY}/sampling",
            description="The prompt's opposite for CHATS: the negative's embedding, pushed away from the positive's. Connect it to a "
            "Two-Model Guider, or in the place of the negative to any sampler.",
            search_aliases=["CHATS", "anti-prompt", "opposite prompt", "negative prompt", "extrapolate conditioning"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; the authors take the empty prompt."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=-1.0,
                    max=10.0,
                    step=0.05,
                    tooltip="α of (1 + α)·negative − α·positive. 0 is the negative, −1 the positive; the authors take 0.5.",
                ),
            ],
            outputs=[io.Conditioning.Output("proxy", display_name="CONDITIONING", tooltip="The proxy prompt.")],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, strength: float) -> io.NodeOutput:
        """The proxy prompt."""
        return io.NodeOutput(proxy_prompt(positive, negative, strength))


NODES = [ProxyPrompt]
