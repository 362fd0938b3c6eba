"""The embedded models, untrained: a Stable Diffusion pipeline in miniature, two preference towers and a reader.

Sizes obey what ComfyUI fixes for the SD1.5 class (32 normalisation groups, a four-level autoencoder with 4 latent
channels, 77 tokens), so that its own classes load the same files.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # the builders import it: in a graph diffusers may be absent
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    from transformers import CLIPTextModel, CLIPTokenizer

from ..models import clip_words
from ..models.clip_words import CONTEXT
from .world import ATTRIBUTES, SIZE, vocabulary

TEXT_WIDTH = 128
LATENT_SCALE = 0.18215  # SD1.5's constant; pretraining rescales the autoencoder to it
FEATURES = 96  # width of the reader's feature vector


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that spell each word of the vocabulary from the left."""
    merges: dict[tuple[str, str], None] = {}
    for word in vocabulary():
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges[(symbols[0], symbols[1])] = None
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    return list(merges)


def write_tokenizer(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt`, tokenizer configs, and `merges.txt.gz` for open_clip's SimpleTokenizer."""
    clip_words.write_tokenizer(folder, [" ".join(m) for m in _merges()])
    (folder / "merges.txt.gz").write_bytes(gzip.compress((folder / "merges.txt").read_text("utf-8").rstrip("\n").encode(), mtime=0))


def vocabulary_size() -> int:
    """Rows of the token embedding: bytes, bytes that end a word, merges, two specials."""
    return 2 * 256 + len(_merges()) + 2


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that `write_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder() -> CLIPTextModel:
    """CLIP text model, 2 layers of 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    end = vocabulary_size() - 1
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size(),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            hidden_act="quick_gelu",
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """ε-prediction UNet on 4×8×8 latents, cross-attention at both levels."""
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    build: Any = UNet2DConditionModel
    return build(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name; it is the number of heads
        norm_num_groups=32,
    )


def build_vae() -> AutoencoderKL:
    """64×64 pixels to 4×8×8 latents.

    64 channels at full resolution, because 32 channels in 32 groups would be normalised one by one, which loses every colour;
    no residual blocks in the encoder's levels, which these images do not need and which would double the time.
    """
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    build: Any = AutoencoderKL  # its annotations say tuple[str] for a tuple of any length
    return build(
        block_out_channels=(64, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=0,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE,
        scaling_factor=LATENT_SCALE,
    )


def build_scheduler() -> DDPMScheduler:
    """SD1.5's noise schedule with the official ImageReFL sampler settings."""
    from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
        variance_type="fixed_small",
    )


TOWERS: dict[str, dict[str, Any]] = {
    "proxy": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIZE, "layers": (1, 1, 1, 1), "width": 12, "head_width": 32},
        "text_cfg": {"context_length": CONTEXT, "width": 64, "heads": 4, "layers": 2},
    },
    "heldout": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIZE, "layers": (2, 2, 2, 2), "width": 8, "head_width": 32},
        "text_cfg": {"context_length": CONTEXT, "width": 48, "heads": 3, "layers": 2},
    },
}
"""open_clip configurations: residual networks, the proxy's wide, the held-out model's deep."""


def build_tower(config: Mapping[str, Any]) -> nn.Module:
    """An untrained open_clip two-tower model of a configuration like those of TOWERS."""
    import open_clip

    text = {**config["text_cfg"], "vocab_size": vocabulary_size()}
    build: Any = open_clip.CLIP
    return build(embed_dim=config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text)


class Extractor(nn.Module):
    """Features of images; a convolutional network that keeps position."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 96, FEATURES)
        blocks: list[nn.Module] = []
        previous = 3
        for width in widths:
            blocks += [nn.Conv2d(previous, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            blocks += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        self.trunk = nn.Sequential(*blocks)
        self.squeeze = nn.Conv2d(FEATURES, 24, 1)  # keeps position: 24 channels of 4×4
        self.embed = nn.Linear(24 * 16, FEATURES)

    def features(self, images: Tensor) -> Tensor:
        """(B,3,64,64) in [0,1] -> (B,96)."""
        images = images if images.shape[-2:] == (SIZE, SIZE) else F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True)
        return self.embed(self.squeeze(self.trunk(images * 2 - 1)).flatten(1))


class Reader(Extractor):
    """Reads a scene's attributes from its features. Trained for attributes alone, never for preference."""

    def __init__(self, attributes: Sequence[str] = tuple(ATTRIBUTES)) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(ATTRIBUTES[name])) for name in attributes})

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """(B,96) -> logits (B, values) per attribute."""
        return {name: head(F.silu(features)) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B,3,64,64) in [0,1] -> logits (B, values) per attribute."""
        return self.read(self.features(images))
