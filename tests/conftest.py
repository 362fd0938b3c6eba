"""What the tests share: a policy small enough to differentiate by hand, and tiny random pipelines."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from trainer.policies.unet import UNetPolicy
from trainer.sampling import add_noise

torch.set_num_threads(1)


class ToyPolicy:
    """D(x, σ) = (x·scale + shift)/(1 + σ²), 2×1×1 latents that are their own pixels; adapter = (scale − 1, shift)."""

    space = "ve"
    latent_shape = (3, 1, 1)

    def __init__(self, dtype=torch.float64):
        self.weight = nn.Parameter(torch.tensor([0.1, -0.2], dtype=dtype))
        self.calls = 0

    def _denoise(self, x, sigma, weight):
        self.calls += len(x)
        return (x * (1 + weight[0]) + weight[1]) / (1 + sigma.to(x).square()).reshape(-1, 1, 1, 1)

    def denoiser(self, prompts, guidance=1.0):
        def denoise(x, sigma):
            assert len(prompts) == len(x) == len(sigma)
            return self._denoise(x, sigma, self.weight)

        return denoise

    def reference(self, prompts, guidance=1.0):
        return lambda x, sigma: self._denoise(x, sigma, torch.zeros(2, dtype=x.dtype)).detach()

    def sigmas(self, steps):
        return torch.cat([torch.linspace(4.0, 0.1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])

    def start(self, noise, steps):
        return noise.double() * 4.0

    def add_noise(self, x0, noise, sigma):
        return add_noise(x0, noise, sigma)

    def decode(self, latents):
        return latents

    def parameters(self):
        return [self.weight]


class ToyReward:
    """−‖image − target‖²: smooth, known gradient."""

    differentiable = True

    def __call__(self, images, prompts):
        return -(images - 0.3).square().flatten(1).sum(1)


@pytest.fixture
def toy_policy():
    return ToyPolicy()


@pytest.fixture
def toy_reward():
    return ToyReward()


def tiny_pipeline(tmp_path):
    """A random Stable Diffusion folder with the embedded model's architecture."""
    from diffusers import StableDiffusionPipeline

    from trainer.demo import architecture

    torch.manual_seed(0)
    architecture.write_tokenizer(tmp_path / "words")
    pipeline = StableDiffusionPipeline(
        vae=architecture.build_vae(),
        text_encoder=architecture.build_text_encoder(),
        tokenizer=architecture.load_tokenizer(tmp_path / "words"),
        unet=architecture.build_unet(),
        scheduler=architecture.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(folder).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def policy(pipeline_folder):
    return UNetPolicy.load(pipeline_folder)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    """A random two-tower reward in the layout that trained ones have."""
    from trainer.demo import architecture, files

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    architecture.write_tokenizer(folder / "words")
    files.write_tower(folder / "tower", architecture.build_tower("proxy"), "proxy", 0.0, 1.0, folder / "words")
    return folder / "tower"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Eight captioned renders as files."""
    from trainer import images
    from trainer.demo.show import real_images

    folder = tmp_path_factory.mktemp("images")
    pictures, captions = real_images(8, 0)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        images.to_pil(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder
