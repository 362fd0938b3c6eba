"""What the embedded proxy says of any prompt, and of this one: `python -m tools.embedded.common_text`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from trainer.demo import experiment, files, world
from trainer.demo.relevant import relevant
from trainer.objectives.policy_gradient.awm import own_images
from trainer.rewards.registry import load
from trainer.rng import Rng

PROMPTS, IMAGES = 64, 4


@torch.no_grad()
def main() -> None:
    """Print standard deviations of the parts, and within prompts their correlations."""
    texts = list(dict.fromkeys(caption.text for caption in world.captions(1000, "train")))
    for name in ("proxy", "heldout"):
        found = files.load_tower(name).text_features(texts)
        along = found @ torch.nn.functional.normalize(found.mean(0), dim=0)
        print(f"{name}: {len(texts)} captions along their common direction {float(along.mean()):.3f} ± {float(along.std()):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        rewards = {
            "proxy": files.load_tower("proxy"),
            "irrelevant": load(relevant(Path(folder), 0.3).replace("relevant", "irrelevant", 1)).reward,
            "omega 0.3": load(relevant(Path(folder), 0.3)).reward,
            "omega 0": load(relevant(Path(folder), 0.0)).reward,
            "gold": files.load_raw_reward("gold"),
            "heldout": files.load_tower("heldout"),
        }
    policy, prompts = experiment.load_base(), [caption.text for caption in world.captions(PROMPTS, "validation")]
    scores: list[torch.Tensor] = []
    for first in range(0, PROMPTS * IMAGES, PROMPTS):
        seeds = Rng(0, 0, tuple(range(first, first + PROMPTS)))
        images = policy.decode(own_images(policy, prompts, seeds, experiment.STEPS, experiment.GUIDANCE, 0.0))
        scores.append(torch.stack([reward(images, prompts) for reward in rewards.values()]))
    table = torch.stack(scores, 1)
    within = (table - table.mean(1, keepdim=True)).flatten(1)
    for name, whole, apart, row in zip(rewards, table.flatten(1).std(1), within.std(1), torch.corrcoef(within), strict=True):
        likeness = ", ".join(f"{other} {float(value):.2f}" for other, value in zip(rewards, row, strict=True))
        print(f"{name}: s.d. {float(whole):.2f}, within a prompt {float(apart):.2f}; correlations within: {likeness}")


if __name__ == "__main__":
    main()
