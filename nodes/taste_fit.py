"""A taste in a graph: fitted to choices on the features of a two-tower reward, and the images to ask about next."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..trainer.rewards.taste import SUFFIX, TasteReward
from ..trainer.rewards.two_tower import TwoTower
from ..trainer.taste.active import next_pairs
from ..trainer.taste.choices import NAME
from ..trainer.taste.comparisons import FEWEST, Gathered, gather, of_pairs
from ..trainer.taste.fit import fit_taste
from .autograd import outside_inference
from .lists import places, prompts_of, usable
from .pairs_files import choices as listed
from .preferences import PreferencePairs
from .rewards import TASTES, Loaded, hashes, roots
from .sockets import CATEGORY, PreferencePairsSocket, Reward, image, schema, show_text
from .taste import mine

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHOICES = "The name of Collect Preferences, or a file as Load Pairs lists it: taste: NAME, output/…/pairs.jsonl."


def path_of(name: str) -> Path:
    """The file of choices that a name means."""
    known = listed().get(name)
    return known if known is not None else mine(name.removeprefix("taste: ")).folder / NAME


def tower_of(reward: Any) -> TwoTower:
    """The two-tower model inside a REWARD_MODEL of one."""
    found = getattr(reward, "reward", None)
    if not isinstance(reward, Loaded) or not isinstance(found, TwoTower):
        raise ValueError("tower: connect Load Reward Model with a two-tower reward, such as pickscore, hpsv2.1, clip or demo-proxy")
    reward.to_device()
    return found


class FitTaste(io.ComfyNode):
    """Choices, REWARD_MODEL -> REWARD_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLFitTaste",
            display_name="Fit Taste",
            category=f"{CATEGORY}/rewards",
            description="Makes a reward of your choices: a small head on the features of a two-tower reward. Its report says how often it "
            "predicts choices it has not seen, beside the tower alone, what more choices would give, and where they contradict each other.",
            search_aliases=["personal reward", "preference model", "bradley-terry", "own taste", "reward from thumbs"],
            is_output_node=True,
            hidden=[io.Hidden.prompt],
            inputs=[
                Reward.Input("tower", tooltip="A two-tower reward: PickScore, HPSv2.1 or CLIP; demo-proxy for the demo model."),
                io.String.Input("choices", default="taste", tooltip=_CHOICES),
                io.String.Input("name", default="taste", tooltip="Saved as models/rewards/taste/NAME: Load Reward Model lists it after R."),
                io.String.Input("person", default="", tooltip="Whose taste, where several people chose; empty: all together."),
                PreferencePairsSocket.Input("pairs", optional=True, tooltip="Pairs of Load Pairs or Make Pairs, in place of choices."),
                io.String.Input(
                    "asked",
                    optional=True,
                    default="",
                    tooltip="Further choices, collected under another name from Ask Next: learnt from, but not counted in the agreement, "
                    "which is higher on them than on other pairs.",
                ),
            ],
            outputs=[
                Reward.Output("reward", display_name="REWARD_MODEL", tooltip="For scoring, search, and training: it has a gradient."),
                io.String.Output("report", display_name="report", tooltip="How far to trust it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, choices: str, asked: str = "", **_: Any) -> str:
        """Runs again where a file has changed."""
        try:
            paths = [path_of(name) for name in (choices, asked) if name]
            return " ".join(f"{path} {path.stat().st_mtime_ns}" for path in paths if path.exists())
        except ValueError:
            return ""

    @classmethod
    def execute(
        cls, tower: Any, choices: str, name: str, person: str, pairs: PreferencePairs | None = None, asked: str = ""
    ) -> io.NodeOutput:
        """Fit and save."""
        if not _NAME.fullmatch(name):
            raise ValueError("name: give 1 to 64 letters, digits, _ and -")
        graph = (getattr(cls.hidden, "prompt", None) or {}).values()
        if sum(node["class_type"] == "ImageReFLFitTaste" and node["inputs"].get("name") == name for node in graph) > 1:
            raise ValueError(f"name: two Fit Taste nodes of this graph write {name}: give each a name of its own")
        found = of_pairs([(pair.chosen, pair.rejected, pair.prompt) for pair in pairs.some], "pairs") if pairs else chosen(choices, asked)
        judged = found.choices
        if judged < FEWEST:  # a new graph has none: what hangs on this waits, and nothing is wrong
            text = f"{judged} choices so far, {FEWEST} are needed, 30 are better: choose in Collect Preferences, then queue again"
            return io.NodeOutput(ExecutionBlocker(None), ExecutionBlocker(None), ui=show_text(cls, text))
        with outside_inference(), torch.enable_grad():
            model = tower_of(tower)
            head, report = fit_taste(found, model, tower.source, hashes(tower)[tower.name], person.strip())
            path = roots()[0] / TASTES / f"{name}{SUFFIX}"
            head.write(path)
            reward = TasteReward(model, head)
        text = "\n".join(report.lines())
        loaded = replace(
            tower, name=f"{TASTES}/{name}", reward=reward, mean=head.mean, std=head.std, source=f"taste@{path}"
        )  # the tower's weights are shared
        return io.NodeOutput(loaded, text, ui=show_text(cls, text))


def chosen(name: str, asked: str = "") -> Gathered:
    """The comparisons of files; none before there are files."""
    given, further = ([path for path in map(path_of, names) if path.exists()] for names in ([name], [asked] if asked else []))
    return gather(given, fewest=0, asked=further) if given or further else Gathered()


class AskNext(io.ComfyNode):
    """IMAGE, REWARD_MODEL -> the images to ask about."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLAskNext",
            display_name="Ask Next",
            category=f"{CATEGORY}/rewards",
            description="Of many images, those whose comparison would say most about your taste: pairs, one after the other, for Collect "
            "Preferences. Without choices so far, those that differ most for the tower.",
            search_aliases=["active learning", "most informative pairs", "uncertain pairs"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="At least two of one prompt, as one batch or a list of batches."),
                Reward.Input("tower", tooltip="The two-tower reward that Fit Taste reads."),
                io.String.Input("prompts", multiline=True, tooltip="One prompt for all images, one per batch, or one line per image."),
                io.String.Input("choices", default="taste", tooltip=_CHOICES),
                io.Int.Input("pairs", default=8, min=1, max=256, tooltip="How many pairs; each image is in one at most."),
            ],
            outputs=[
                io.Image.Output(
                    "asked",
                    display_name="images",
                    is_output_list=True,
                    tooltip="Two and two, the most telling pair first; a batch per prompt.",
                ),
                io.String.Output("prompt", display_name="prompt", is_output_list=True, tooltip="Of each batch."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Runs again: the choices go on."""
        return float("nan")

    @classmethod
    def execute(
        cls, images: list[torch.Tensor], tower: list[Any], prompts: list[str], choices: list[str], pairs: list[int]
    ) -> io.NodeOutput:
        """Order."""
        texts = prompts_of(prompts, images, per_line=True)
        finite, fit = usable(images)
        texts = [text for text, ok in zip(texts, fit) if ok]
        with outside_inference(), torch.no_grad():
            model = tower_of(tower[0])
            seen = torch.cat([model.image_features(one[None].to(model.home)).double().cpu() for one in finite])
            asked = next_pairs(model, seen, texts, pairs[0], chosen(choices[0]), apart=True, sizes=[tuple(one.shape) for one in finite])
        if not asked:
            raise ValueError("no prompt has two images of one size: a comparison is between two images of one prompt")
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for one in asked:
            groups.setdefault((texts[one.first], tuple(finite[one.first].shape)), []).extend((one.first, one.second))
        batches = [image(torch.stack([finite[i] for i in rows])) for rows in groups.values()]
        numbers = places(fit)
        lines = [f"{one.bits:.2f} bits: image {numbers[one.first]} or {numbers[one.second]}" for one in asked[:16]]
        return io.NodeOutput(batches, [text for text, _ in groups], ui=show_text(cls, "\n".join(lines)))


NODES = [FitTaste, AskNext]
