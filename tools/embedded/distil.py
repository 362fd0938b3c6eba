"""The embedded model's consistency LoRA: what SQDF estimates x̂0 with, distilled from the guided base model.

    python -m tools.embedded.distil DIR      # resumable; writes DIR/consistency.safetensors, with --export the shipped file

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1) into an adapter (LCM-LoRA, arXiv:2311.05556).
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.latents import LatentsInMemory
from trainer.data.samples import encode_images
from trainer.demo import files
from trainer.demo.experiment import GUIDANCE
from trainer.demo.world import real_images
from trainer.lora.file import save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.rng import generator
from trainer.runtime.files import file_hash
from trainer.sampling import step as sampler_step
from trainer.training import checkpoint
from trainer.training.loop import Ema

from .export import save_half_lora

log = logging.getLogger(__name__)

GRID = 40  # levels between whose neighbours consistency is asked for
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj")
LORA = Lora(rank=8, alpha=8.0, targets=TARGETS)  # LCM-LoRA adapts every kind of layer too


def pseudo_huber(error: Tensor) -> Tensor:
    """√(e² + c²) − c, mean over everything; c = 0.001 as the paper."""
    return ((error.square() + 1e-6).sqrt() - 1e-3).mean()


def distil(work: Path, steps: int, batch: int, lr: float = 1e-3, decay: float = 0.99, seed: int = 0) -> Path:
    """Distil, going on from the state in `work`; returns the LoRA's path.

    f(x_i) of the student is drawn to f(x_{i+1}) of its moving average, where the guided base takes x_i to x_{i+1} by DDIM;
    at the last level the target is the base's own x0-prediction.
    """
    policy = UNetPolicy.load(files.PIPELINE)
    samples = encode_images(policy, *real_images(4096, seed))
    assert isinstance(samples.latents, LatentsInMemory) and isinstance(samples.latents.mean, torch.Tensor)
    policy.add_lora(LORA, seed)
    average = Ema(policy.named_parameters(), decay)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    first, state_path = 0, work / "consistency.pt"
    if state_path.is_file():
        state = checkpoint.load(state_path)
        _write(policy, state["adapter"])
        average.values = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    sigmas = policy.sigmas(GRID)
    running = 0.0
    for number in range(first, steps):
        torch_rng, rng = generator(seed, "distil", number), random.Random(f"{seed}/distil/{number}")
        rows = [rng.randrange(len(samples.prompts)) for _ in range(batch)]
        prompts = [samples.prompts[r] for r in rows]
        index = torch.randint(GRID, (batch,), generator=torch_rng)
        here, there = sigmas[index], sigmas[index + 1]
        x = policy.add_noise(samples.latents.mean[rows], torch.randn(batch, *policy.latent_shape, generator=torch_rng), here)
        teacher = policy.denoiser(prompts, adapter="base", guidance_scale=GUIDANCE)(x, here)
        following = sampler_step(x, teacher, here, there, eta=0.0)
        last = (there == 0).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            trained = {name: p.detach().clone() for name, p in policy.named_parameters()}
            _write(policy, average.values)
            target = policy.denoiser(prompts)(following, there.clamp(min=float(sigmas[-2])))
            _write(policy, trained)
        loss = pseudo_huber(policy.denoiser(prompts)(x, here) - torch.where(last, teacher, target))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (number + 1) / 20) * min(1.0, (steps - number) / (0.3 * steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        average.update(policy.named_parameters())
        running = 0.98 * running + 0.02 * float(loss.detach()) if number > first else float(loss.detach())
        if (number + 1) % 50 == 0 or number + 1 == steps:
            log.info("step %d of %d: loss %.4f", number + 1, steps, running)
            adapter = {name: p.detach() for name, p in policy.named_parameters()}
            state = {"step": number + 1, "adapter": adapter, "average": average.values, "optimizer": optimizer.state_dict()}
            checkpoint.save(state, state_path)
    path = work / "consistency.safetensors"
    base = file_hash(files.PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    save_lora(policy, path, {"base": base, "kind": "consistency", "guidance": GUIDANCE, "steps": steps}, average.values)
    return path


@torch.no_grad()
def _write(policy: UNetPolicy, values: dict[str, Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        parameter.copy_(values[name])


def main() -> None:
    """Distil into a folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Distil the embedded model's consistency LoRA")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--export", action="store_true", help="put it among the files that the package ships, in fp16")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.work.mkdir(parents=True, exist_ok=True)
    path = distil(a.work, a.steps, a.batch)
    if a.export:
        save_half_lora(path, files.CONSISTENCY)
    log.info("wrote %s", files.CONSISTENCY if a.export else path)


if __name__ == "__main__":
    main()
