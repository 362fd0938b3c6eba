"""A person's choices as a file, and the taste that is fitted to them."""

from __future__ import annotations

import pytest

from trainer.__main__ import main
from trainer.data.images import to_pil
from trainer.demo import world
from trainer.taste.choices import append, choice, save_image


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    """Sixteen prompts with two renders each; the person prefers the darker one."""
    folder = tmp_path_factory.mktemp("judged")
    prompts = world.captions(16, "judged")
    renders = world.real_renders(prompts, 2, 3)
    for i, caption in enumerate(prompts):
        both = renders[2 * i : 2 * i + 2]
        shown = [save_image(folder, to_pil(one), seed=i) for one in both]
        darker = int(both[1].mean() < both[0].mean())
        append(folder / "choices.jsonl", choice("pair", caption.text, shown, "chosen", darker, [i % 2, 1 - i % 2], person="ann"))
    return folder


@pytest.fixture(scope="session")
def taste(judged):
    path = judged / "taste.safetensors"
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(path)]) == 0
    return path
