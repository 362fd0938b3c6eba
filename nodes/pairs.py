"""Pairs in a graph: make them from scored images, and filter and split them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainer.data.images import ImageSource
from ..trainer.pairs import split as splitting
from ..trainer.pairs.filter import Filter, TextFeatures, filtered, valued
from ..trainer.pairs.label import Pair, Scored, candidates
from ..trainer.pairs.near_copies import Thumbnails
from ..trainer.pairs.report import lines, report
from ..trainer.text import counted
from .autograd import outside_inference
from .lists import places, prompts_of, unfit, usable
from .preferences import ImageInMemory, PreferencePairs, shown
from .rewards import trained_on
from .scoring import score
from .sockets import CATEGORY, PreferencePairsSocket, Reward, collected, schema, show_text, widgets

_SHOWN = 16  # pairs on the preview
PAIRS_OUT = PreferencePairsSocket.Output("preference_pairs", display_name="pairs", tooltip="For Filter Pairs, Save Pairs, and training.")


def preview(pairs: Sequence[Pair]) -> Tensor:
    """IMAGE (B,H,W,3): the better image and beside it the worse, a pair in each."""
    some = pairs[:_SHOWN]
    return torch.cat([shown([pair.chosen for pair in some]), shown([pair.rejected for pair in some])], 2)


def said(candidates_: Sequence[Pair], kept: dict[str, list[Pair]], dropped: Counter[str], of: PreferencePairs, share: float = 0.0) -> str:
    """The report of what was kept. share: of the pairs that was to be held out."""
    return "\n".join(lines(report(candidates_, kept, dropped, of.rewards, of.heldout, share=share), "standard deviations"))


class MakePairs(io.ComfyNode):
    """IMAGE, prompts, REWARD_MODEL × up to 4 -> PREFERENCE_PAIRS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        others = [Reward.Input(f"reward_{x}", optional=True, tooltip="A further reward, with a vote of its own.") for x in "bcd"]
        return schema(
            node_id="ImageReFLMakePairs",
            display_name="Make Pairs",
            category=f"{CATEGORY}/training",
            description="Scores several images of each prompt, and makes pairs of a better and a worse one, for Diffusion-DPO, MaPO and "
            "the like, and likes for Diffusion-KTO.",
            search_aliases=["preference pairs", "dpo data", "winner loser", "pick-a-pic", "liked disliked"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="At least two per prompt, as one batch or a list of batches."),
                Reward.Input("reward", tooltip="What ranks the images. Combine Rewards counts as one."),
                io.String.Input(
                    "prompts", multiline=True, tooltip="One prompt for all images, one per batch of a list, or one line per image."
                ),
                io.Combo.Input(
                    "label",
                    options=["sum", "majority"],
                    default="sum",
                    tooltip="sum: the sum of the rewards' standardised scores decides. majority: each reward has a vote.",
                ),
                io.Int.Input(
                    "per_prompt",
                    default=1,
                    min=0,
                    max=4096,
                    tooltip="Pairs of each prompt, those of the highest margin; 0: every two images.",
                ),
                *others,
                Reward.Input("heldout", optional=True, tooltip="A reward that ranks nothing: the report says how often it agrees."),
            ],
            outputs=[
                PAIRS_OUT,
                io.Image.Output("preview", display_name="preview", tooltip="The first pairs: better left, worse right."),
                io.String.Output("report", display_name="report", tooltip="Kept and dropped pairs, margins, agreement."),
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], reward: list[Any], prompts: list[str], label: list[Any], per_prompt: list[int], **more: Any
    ) -> io.NodeOutput:
        """Score and pair."""
        rewards = [reward[0], *(more[f"reward_{x}"][0] for x in "bcd" if more.get(f"reward_{x}"))]
        heldout = more["heldout"][0] if more.get("heldout") else None
        check(rewards, heldout)
        every = prompts_of(prompts, images, per_line=True)
        finite, fit = usable(images)
        texts = [every[i] for i in places(fit)]
        if not all(text.strip() for text in texts):
            raise ValueError("an image has no prompt: images are compared under one prompt, which training needs too; write one")
        alone = sorted({text for text in texts if texts.count(text) < 2})
        if len(alone) == len(set(texts)):
            raise ValueError(f"prompt {alone[0]!r} has one image, as each prompt has: a pair is two images of one prompt")
        scored, without = _scored(finite, texts, rewards, heldout)
        dropped = Counter({"images alone under their prompt": sum(texts.count(text) == 1 for text in texts)}) if alone else Counter[str]()
        found = list(candidates(scored, [1.0] * len(rewards), label[0], dropped))
        settings = Filter(per_prompt=per_prompt[0])
        kept = filtered(valued(found, settings, None, None), settings, Thumbnails(), dropped)
        if not kept:
            raise ValueError(f"no pair: {', '.join(counted(number, why) for why, number in dropped.items())}; draw more or other images")
        result = PreferencePairs(tuple(kept), tuple(one.name for one in rewards), heldout.name if heldout else "")
        text = "\n".join([said(found, {"pairs": kept}, dropped, result), *unfit(fit, "is left out"), *without])
        return io.NodeOutput(result, preview(kept), text, ui=show_text(cls, text))


def check(rewards: Sequence[Any], heldout: Any) -> None:
    """ValueError where rewards cannot be compared, or the held-out one is among them."""
    unknown = [one.name for one in rewards if not getattr(one, "standardised", True)]
    if unknown and len(rewards) > 1:
        raise ValueError(
            f"no mean and standard deviation are known for {unknown[0]}, in which several rewards are compared: measure them with "
            "`python -m trainer rewards calibrate`"
        )
    names = [one.name for one in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"reward {twice} is connected twice: connect another, or disconnect one")
    if heldout is not None and trained_on(heldout, rewards):
        raise ValueError(f"heldout is {heldout.name}, which ranks the images too: a held-out reward is another one")


def _scored(images: Sequence[Tensor], texts: Sequence[str], rewards: Sequence[Any], heldout: Any) -> tuple[list[Scored], list[str]]:
    """The images with finite scores, and a line for each other one."""
    columns = [score(one, images, texts)[1].tolist() for one in [*rewards, *([heldout] if heldout is not None else [])]]
    found: list[Scored] = []
    without: list[str] = []
    for i, (image, text, *scores) in enumerate(zip(images, texts, *columns)):
        if all(map(math.isfinite, scores)):
            own = tuple(scores[: len(rewards)])
            found.append(Scored(ImageInMemory.of(image, f"image {i}"), text, own, scores[-1] if heldout is not None else None))
        else:
            without.append(f"image {i} has no finite score and is left out")
    return found, without


class FilterPairs(io.ComfyNode):
    """PREFERENCE_PAIRS -> those that are kept, and those that are held out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLFilterPairs",
            display_name="Filter Pairs",
            category=f"{CATEGORY}/training",
            description="Keeps the pairs that teach most: by margin, agreement of the rewards, near-copies, numbers and FiFA's value; and "
            "holds out a share that has no prompt and no image in common with the rest.",
            search_aliases=["preference data filter", "fifa", "held-out split", "train test split"],
            is_output_node=True,
            inputs=[
                PreferencePairsSocket.Input("pairs", tooltip="From Make Pairs, or Load Pairs of its table."),
                *widgets(Filter, skip=("quality_weight",)),
                io.Float.Input("split", default=0.0, min=0.0, max=0.9, step=0.05, tooltip="Share of the pairs that is held out; 0: none."),
                io.Int.Input("split_seed", default=0, min=0, max=2**31 - 1, tooltip="Which prompts are held out."),
                Reward.Input("features", optional=True, tooltip="For diversity_weight: a two-tower reward whose text features it reads."),
            ],
            outputs=[
                PAIRS_OUT,
                PreferencePairsSocket.Output(
                    "heldout_pairs", display_name="heldout_pairs", tooltip="Those that are held out; needs split."
                ),
                io.Image.Output("preview", display_name="preview", tooltip="The first pairs: better left, worse right."),
                io.String.Output("report", display_name="report", tooltip="Kept and dropped pairs, margins, agreement."),
            ],
        )

    @classmethod
    def execute(cls, pairs: PreferencePairs, split: float, split_seed: int, features: Any = None, **values: Any) -> io.NodeOutput:
        """Filter and split."""
        settings, dropped, thumbnails = collected(Filter, values), Counter[str](), Thumbnails()
        kept = filtered(valued(pairs.some, settings, _text_features(features), None), settings, thumbnails, dropped)
        if not kept:
            raise ValueError(f"no pair is left: {', '.join(counted(number, why) for why, number in dropped.items())}")
        train, held = splitting.split(kept, split, split_seed, thumbnails, settings.near_copies)
        parts = {"pairs": train, **({"pairs-heldout": held} if held else {})}
        text = said(pairs.pairs, parts, dropped, pairs, split)
        of = lambda part: PreferencePairs(tuple(part), pairs.rewards, pairs.heldout)  # noqa: E731
        return io.NodeOutput(of(train), of(held), preview(train), text, ui=show_text(cls, text))


def _text_features(reward: Any) -> TextFeatures | None:
    """The text features of a two-tower REWARD_MODEL; None without one."""
    if reward is None:
        return None
    if not getattr(reward, "takes_prefixes", False):
        raise ValueError("features: only a two-tower reward (HPS, PickScore, CLIP) has features of texts")

    def features(prompts: Sequence[str]) -> Tensor:
        with torch.no_grad(), outside_inference():
            reward.to_device()
            return reward.reward.text_features(prompts)

    return features


def sources(pairs: Sequence[Pair]) -> list[ImageSource]:
    """Every image of pairs, once."""
    return list(dict.fromkeys(image for pair in pairs for image in (pair.chosen, pair.rejected)))


NODES = [MakePairs, FilterPairs]
