"""The published implementations on the embedded model: their images, to 1e-5.

`official.safetensors` holds what they gave: 10 steps, guidance 2, our start and step noise put in place of theirs (`randn_tensor`;
for fk, whose class is given the states, `torch.multinomial` as systematic resampling). Sources: FK-Diffusion-Steering 9413005
(`FKD.resample`), masa-ue/SVDD-image 920d3b6 and divelab/DSearch 364147d (`Decoding_nonbatch_SDPipeline`), anujinho/code 4c80b45
(`CoDeSDPipeline`).

Where ours differs: FK's pipeline scores the x0-prediction of the state before the step whose result it resamples, ours that of the state
itself, which both were given here; its last weight has the maximum or the sum over the path in place of the image's reward; its gate
forgets weights, so both resample always here. In theirs all children share one start, in ours each has its own; here all share it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.demo import experiment, files
from trainer.search.loop import ancestral, particle_noise, search_images
from trainer.search.plan import rounds_of
from trainer.search.settings import search_of

PROMPT, STEPS, SEED = "a large red star on a black background, crisp, vivid", 10, 3
OFFICIAL = load_file(Path(__file__).with_name("official.safetensors"))
IMAGES = [name for name in OFFICIAL if not name.endswith("weights")]
QUICK = ("code particles=1 children=3 block=5", "fk diff")


def value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@pytest.fixture(scope="module")
def world():
    return experiment.load_base(), files.load_reward("proxy")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in IMAGES])
def test_images_are_those_of_the_official_code(world, name):
    policy, reward = world
    method, *given = name.split()
    fk = method == "fk"
    fields = {key: value(text) for key, text in (item.split("=") for item in given if "=" in item)}
    if fk:
        fields = {"particles": 6, "block": 2, "start": 0.2, "end": 0.8, "potential": given[0], "strength": 1.0, "ess": 1.0}
    search = search_of(method, fields)
    rounds, sigmas, noise = rounds_of(search, STEPS, SEED), policy.sigmas(STEPS), particle_noise(SEED, 1, policy.latent_shape)

    def model(i, x):
        return policy.denoiser([PROMPT] * len(x), adapter="base", guidance_scale=2.0)(x, sigmas[i].expand(len(x)))

    def score(latents):
        return reward(policy.decode(latents), [PROMPT] * len(latents)) + (3.0 if fk else 0.0)  # above 0, where theirs starts its maximum

    drawn = [torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(100 + i)) for i in range(rounds[0].parents)]
    start = torch.stack(drawn).repeat_interleave(rounds[0].children, 0) * (1 + sigmas[0].square()).sqrt()
    found = search_images(search, rounds, sigmas, start, model, ancestral(sigmas, noise), score, SEED)
    assert found.latents.shape == OFFICIAL[name].shape
    assert (found.latents - OFFICIAL[name]).abs().max() < 1e-5
    if given[0] in ("diff", "rt"):  # max and add have the path's term in theirs
        difference = OFFICIAL[f"{name} weights"].double() - torch.tensor(found.log_weights)
        assert difference.abs().max() < 1e-5
