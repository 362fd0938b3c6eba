"""The embedded model's tiny decoder, for `gradient_vae = "demo"`: an AutoencoderTiny distilled from the whole decoder.

    python -m tools.embedded.tiny_decoder DIR      # resumable; with --export the shipped folder

As TAESD (https://github.com/madebyollin/taesd), but for a discriminator: images of the whole decoder are the targets. Its latents are
those of real images and x0-predictions of the base model at every noise level, which is what a reward gradient decodes.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.demo import files
from trainer.demo.world import real_images
from trainer.models.tiny_decoder import WEIGHTS
from trainer.models.unet import UNetPolicy
from trainer.rng import generator
from trainer.training import checkpoint

from .export import renew_hash

log = logging.getLogger(__name__)

WIDTH, BLOCKS, NUMBER = 32, (1, 1, 1, 1), 3072


def build() -> Any:
    """The untrained decoder as a diffusers AutoencoderTiny; its encoder is never trained nor shipped."""
    from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]

    cls: Any = AutoencoderTiny
    sizes = {"decoder_block_out_channels": (WIDTH,) * 4, "num_decoder_blocks": BLOCKS}
    return cls(**sizes, encoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4, latent_channels=4)


@torch.no_grad()
def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Scaled latents (N,4,8,8) and the whole decoder's images (N,3,64,64) in [0,1]: half of real images, half of x0-predictions."""
    policy = UNetPolicy.load(files.PIPELINE)
    images, prompts = real_images(NUMBER, seed)
    latents = torch.cat([policy.encode(part)[0] for part in images.split(64)])
    rng, sigmas = generator(seed, "tiny decoder"), policy.sigmas(20)
    for first in range(0, NUMBER // 2, 64):
        rows = slice(first, first + 64)
        sigma = sigmas[torch.randint(20, (64,), generator=rng)]
        x = policy.add_noise(latents[rows], torch.randn(64, *policy.latent_shape, generator=rng), sigma)
        latents[rows] = policy.denoiser(prompts[rows], adapter="base")(x, sigma)
    return latents, torch.cat([policy.decode(part) for part in latents.split(64)])


def distil(work: Path, steps: int, batch: int, lr: float = 2e-3, seed: int = 0) -> Any:
    """The trained network, going on from the state in `work`."""
    torch.manual_seed(seed)
    tiny, cache, state_path = build().to(memory_format=torch.channels_last), work / "pairs.pt", work / "tiny_decoder.pt"
    if not cache.is_file():
        torch.save(pairs(seed), cache)
        log.info("cached %d latents and images", NUMBER)
    latents, images = torch.load(cache, weights_only=True)
    optimizer, first = torch.optim.AdamW(tiny.decoder.parameters(), lr=lr, weight_decay=0.0), 0
    if state_path.is_file():
        state = checkpoint.load(state_path)
        tiny.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    running = 0.0
    for number in range(first, steps):
        rows = torch.randint(NUMBER, (batch,), generator=generator(seed, "tiny decoder rows", number))
        with torch.autocast("cpu", torch.bfloat16):
            decoded = tiny.decode(latents[rows]).sample.float()
        error = decoded / 2 + 0.5 - images[rows]
        loss = (error.square() + 0.1 * error.abs()).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (number + 1) / 20) * min(1.0, (steps - number) / (0.5 * steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        rms = float(error.detach().square().mean().sqrt())
        running = 0.95 * running + 0.05 * rms if number > first else rms
        if (number + 1) % 50 == 0 or number + 1 == steps:
            log.info("step %d of %d: RMS error %.4f", number + 1, steps, running)
            state = {"step": number + 1, "decoder": tiny.decoder.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(state, state_path)
    return tiny


def save(tiny: Any, folder: Path) -> None:
    """A diffusers folder of the decoder alone, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"decoder.{name}": value.half().contiguous() for name, value in tiny.decoder.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {key: value for key, value in tiny.config.items() if not key.startswith("_") and key != "block_out_channels"}
    text = json.dumps({"_class_name": "AutoencoderTiny", **config}, indent=2)
    (folder / "config.json").write_text(text + "\n", "utf-8")


def main() -> None:
    """Distil into a folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Distil the embedded model's tiny decoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--export", action="store_true", help="put it among the files that the package ships")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.work.mkdir(parents=True, exist_ok=True)
    folder = files.TINY_DECODER if a.export else a.work / "tiny_decoder"
    save(distil(a.work, a.steps, a.batch), folder)
    if a.export:
        renew_hash(folder / WEIGHTS)
    log.info("wrote %s", folder)


if __name__ == "__main__":
    main()
