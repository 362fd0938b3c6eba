"""Pretrain the embedded world from nothing, stage by stage; every stage resumes where it was interrupted.

    python -m tools.embedded.pretrain --work DIR --steps N STAGE...

The gallery and the samples come from the shipped pipeline: `export` stands before and after them. Every batch is a pure function of
(seed, stage, step), so a resumed stage sees the batches it would have seen.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.demo import architecture, world
from trainer.runtime.processes import ALONE, Processes, joined
from trainer.training import checkpoint

from .export import export
from .extractor import pretrain_extractor
from .fit import DECAY, LATENT_NOISE, TextToLatent, fit, generator, load_stage
from .pictures import cache_gallery, cache_samples
from .preference import pretrain_tower

log = logging.getLogger(__name__)


def scene_batch(seed: int, stage: str, step: int, n: int) -> tuple[Tensor, Tensor]:
    """Attributes (n,8) and images (n,3,64,64) of one step."""
    attributes, jitter = world.draw_scenes(n, generator(seed, stage, step))
    return attributes, world.render(attributes, jitter)


def _widened(attributes: Tensor, jitter: Tensor) -> Tensor:
    """Jitter beyond [0,1) that renders any rotation, and radii of 8.5–11 and 15.5–19 pixels."""
    jitter, radius = jitter.clone(), torch.tensor([[8.5, 11.0], [15.5, 19.0]])
    size = attributes[:, list(world.ATTRIBUTES).index("size")]
    ours, theirs = world.RADIUS[size], radius[size]
    wanted = theirs[:, 0] + (theirs[:, 1] - theirs[:, 0]) * jitter[:, 1]
    jitter[:, 0] = (2 * math.pi * jitter[:, 0] / world.TILT + 1) / 2
    jitter[:, 1] = (wanted - ours[:, 0]) / (ours[:, 1] - ours[:, 0])
    return jitter


def pretrain_vae(work: Path, seed: int, steps: int, batch: int = 16, compiled: bool = False) -> None:
    """The autoencoder: deterministic mean, fixed latent noise, no adversary.

    The posterior's width is fixed rather than learned: sampling it from the start stalls the decoder. Objects are seen at
    every rotation and at more sizes than scenes have, so that the code holds more than the scenes.
    """
    vae: Any = architecture.build_vae()
    encode, decode = vae.encoder, vae.decoder
    if compiled:
        encode, decode = torch.compile(vae.encoder), torch.compile(vae.decoder)

    def loss_at(step: int) -> Tensor:
        attributes, jitter = world.draw_scenes(batch, generator(seed, "vae", step))
        images = world.render(attributes, _widened(attributes, jitter)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.quant_conv(encode(images))[:, :4]
        mean = mean.float()
        noise = torch.randn(mean.shape, generator=generator(seed, "vae noise", step))
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decode(vae.post_quant_conv(mean + LATENT_NOISE * noise))
        # the penalty on the mean is the KL term of a posterior of fixed width; it keeps the latents near unit scale
        penalty = 1e-3 * (mean.square().mean() - 1).relu() + 1e-5 * mean.square().mean()
        error = decoded.float() - images
        if step < 1500:
            return error.square().mean() + 0.05 * error.abs().mean() + penalty
        return _object_loss(error, images) + penalty

    fit("vae", vae, loss_at, steps=steps, lr=1.5e-3, work=work, decay=0.998)


def _object_loss(error: Tensor, images: Tensor) -> Tensor:
    """Squared and absolute errors, most of all where the object is: grounds are nine tenths of the pixels and soon perfect."""
    found = (images - images[..., :1, :1]).abs().sum(1, keepdim=True) > 0.1
    weight = 1 + 4 * F.max_pool2d(found.float(), 3, stride=1, padding=1)
    return (weight * (error.square() + 0.3 * error.abs())).mean()


def pretrain_decoder(work: Path, seed: int, steps: int, batch: int = 16, compiled: bool = False) -> None:
    """The decoder alone, on the scenes as they are; latents stay what they were, so the UNet can train meanwhile."""
    vae = load_stage(work, "vae", architecture.build_vae())
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    decoder: Any = torch.compile(vae.decoder) if compiled else vae.decoder

    def loss_at(step: int) -> Tensor:
        _, images = scene_batch(seed, "decoder", step, batch)
        images = images * 2 - 1
        rng = generator(seed, "decoder noise", step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.quant_conv(vae.encoder(images))[:, :4].float()
            decoded = decoder(vae.post_quant_conv(mean + LATENT_NOISE * torch.randn(mean.shape, generator=rng)))
        return _object_loss(decoded.float() - images, images)

    fit("decoder", vae, loss_at, steps=steps, lr=1e-3, work=work, decay=0.998)


def encode(vae: Any, images: Tensor) -> Tensor:
    """Unscaled latent means of images in [0,1]."""
    return vae.quant_conv(vae.encoder(images * 2 - 1))[:, :4]


@torch.no_grad()
def cache_latents(work: Path, seed: int, steps: int, **_: object) -> None:
    """`steps` batches of 64 scenes with their latent means, so that the UNet's training never renders."""
    vae = load_stage(work, "vae", architecture.build_vae())
    scenes, means = [], []
    for step in range(steps):
        attributes, images = scene_batch(seed, "latents", step, 64)
        scenes.append(attributes.to(torch.uint8))
        means.append(encode(vae, images))
        if (step + 1) % 100 == 0:
            log.info("latents %d of %d", step + 1, steps)
    latents = torch.cat(means)
    shift_free_scale = 1 / latents.std()  # one number, as SD1.5: no shift
    state = {"scenes": torch.cat(scenes), "latents": latents * shift_free_scale, "scale": float(shift_free_scale)}
    checkpoint.save(state, work / "latents.pt")
    log.info("latents %s, scale %.4f", tuple(latents.shape), float(shift_free_scale))


def pretrain_unet(work: Path, seed: int, steps: int, compiled: bool = False, batch: int = 64, processes: Processes = ALONE) -> None:
    """UNet and text encoder: ε-prediction, min-SNR-5 weights (arXiv:2303.09556), one caption in ten dropped.

    Until the learning rate falls, captions are padded to 24 tokens instead of 77: no caption is longer, and a step costs a
    quarter less.
    """
    if processes.main:
        architecture.write_tokenizer(work / "tokenizer")
    processes.exchange(None)
    tokenizer = architecture.load_tokenizer(work / "tokenizer")
    cache = torch.load(work / "latents.pt", weights_only=True)
    scenes, latents = cache["scenes"].long(), cache["latents"]
    cumulative = architecture.build_scheduler().alphas_cumprod
    model = TextToLatent()
    unet: Any = torch.compile(model.unet, dynamic=False) if compiled else model.unet

    def loss_at(step: int) -> Tensor:
        torch_rng, rng = generator(seed, "unet", step, processes.rank), random.Random(f"{seed}/{step}/{processes.rank}")
        n = batch // processes.count
        tokens = 24 if step < (1 - DECAY) * steps else architecture.CONTEXT
        rows = torch.randint(len(latents), (n,), generator=torch_rng)
        captions = [world.draw_caption(s, rng).text if rng.random() > 0.1 else "" for s in scenes[rows].tolist()]
        ids = tokenizer(captions, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
        t = torch.randint(1000, (n,), generator=torch_rng)
        noise = torch.randn(n, 4, 8, 8, generator=torch_rng)
        signal = cumulative[t][:, None, None, None]
        # posterior noise as at training time of the decoder
        x0 = latents[rows] + LATENT_NOISE * torch.randn(n, 4, 8, 8, generator=torch_rng)
        x = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        predicted = unet(x, t, encoder_hidden_states=model.text(ids)[0]).sample
        snr = cumulative[t] / (1 - cumulative[t])
        return ((predicted - noise).square().mean((1, 2, 3)) * (5 / snr).clamp(max=1)).mean()

    fit("unet", model, loss_at, steps=steps, lr=1e-3, work=work, decay=0.9995, save_every=250, processes=processes)


def pretrain_reader(work: Path, seed: int, steps: int, batch: int = 64, **_: object) -> None:
    """The attribute reader: half renders, half decoded images, with a little pixel noise."""
    gallery, reader = torch.load(work / "gallery.pt", weights_only=True), architecture.Reader()

    def loss_at(step: int) -> Tensor:
        attributes, images = scene_batch(seed, "reader", step, batch // 2)
        rng = generator(seed, "reader rows", step)
        rows = torch.randint(len(gallery["images"]), (batch // 2,), generator=rng)
        attributes = torch.cat([attributes, gallery["scenes"][rows].long()])
        images = torch.cat([images, gallery["images"][rows].float() / 255])
        logits = reader(images + 0.02 * torch.randn(images.shape, generator=rng))
        losses = [F.cross_entropy(logits[name], attributes[:, column]) for column, name in enumerate(world.ATTRIBUTES)]
        return torch.stack(losses).sum()

    fit("reader", reader, loss_at, steps=steps, lr=2e-3, work=work, decay=0.998, weight_decay=1e-3)


STAGES: dict[str, Callable[..., None]] = {
    "vae": pretrain_vae,
    "latents": cache_latents,
    "decoder": pretrain_decoder,
    "unet": pretrain_unet,
    "gallery": cache_gallery,
    "samples": cache_samples,
    "reader": pretrain_reader,
    "proxy": lambda work, seed, steps, **_: pretrain_tower("proxy", work, seed, steps),
    "export": export,
    "heldout": lambda work, seed, steps, **_: pretrain_tower("heldout", work, seed, steps),
    "extractor": pretrain_extractor,
}


def main() -> None:
    """Run the named stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("pretrain"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with joined() as processes:
        for stage in arguments.stages:
            shared = {"processes": processes} if stage == "unet" else {}
            STAGES[stage](arguments.work, arguments.seed, arguments.steps, compiled=arguments.compile, **shared)


if __name__ == "__main__":
    main()
