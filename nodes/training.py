"""Training nodes: their inputs, and the run that they start."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..trainer.config import NAMES, build
from ..trainer.objectives import OBJECTIVES, ImageReFL
from ..trainer.policy import ATTENTION, Lora
from ..trainer.training.config import TrainConfig
from .graph_run import train_in_graph
from .memory import MODES
from .run_folders import LAST, NEW, resumable
from .sockets import (
    CATEGORY,
    Dataset,
    LoraWeights,
    Losses,
    Objective,
    PreferencePairsSocket,
    Reward,
    schema,
    show_text,
    widget_name,
    widgets,
)

_OURS = (
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_warmup_steps",
    "max_grad_norm",
    "ema",
    "seed",
    "save_every",
    "gradient_checkpointing_denoiser",
)
"""The settings of a run that are widgets; the others are sockets here, or of no use in a graph."""


_SHOWN = {"prompts", "switch_at", "steps", "batch", "lr", "rank", "name", "resume", "memory"}


_OLD = {
    "train_steps": "steps",
    "train_cfg": "guidance",
    "train_seed": "seed",
    **{label: old for old, label in NAMES.values() if label != "cfg"},
}
"""Inputs of the training nodes by their names in 0.1.0. Not `seed`: the browser gives an integer of that name another value after
each run, and what has another seed is trained again."""


def _renamed(described: io.Schema, node_id: str) -> io.Schema:
    """The schema of a node of 0.1.0, under another id and with the new names of its inputs."""
    names = {old: new for new, old in _OLD.items()}
    described.node_id, described.is_deprecated = node_id, False
    for one in described.inputs:
        if one.id in names:
            one.id, one.display_name = names[one.id], None
    return described


def _run_inputs() -> list[Any]:
    own = [w for w in widgets(TrainConfig, tuple(f.name for f in fields(TrainConfig) if f.name not in _OURS))]
    return [
        *own,
        *widgets(Lora, ("targets",)),
        io.String.Input(
            "targets", default=", ".join(ATTENTION), tooltip="Module names that get an adapter: attention projections. Separate by commas."
        ),
        io.String.Input("name", default="imagerefl", tooltip="Folder of the run, below output/imagerefl; a number is added if it exists."),
        io.Combo.Input(
            "resume",
            options=[NEW, LAST, *resumable()],
            default=NEW,
            tooltip="Go on from the state of a cancelled run, or give a finished one more steps. It keeps its seed; other settings must be "
            "the same.",
        ),
        io.Int.Input("preview_every", default=10, min=0, max=10000, tooltip="Steps between previews and their scores; 0 makes none."),
        io.Float.Input("preview_cfg", default=7.5, min=0.0, max=30.0, step=0.1, tooltip="Guidance of the base's part of the preview."),
        io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip="Pixels, where no images are connected."),
        io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip="Pixels, where no images are connected."),
        io.Int.Input(
            "image_size",
            default=512,
            min=0,
            max=8192,
            step=8,
            tooltip="Shorter side that images are resized to; 0 keeps theirs. A dataset: side of the square.",
        ),
    ]


_SOCKETS = [
    io.Model.Input("model", tooltip="The base model. It stays as it is."),
    io.Vae.Input("vae", tooltip="Decodes for the reward, with gradients; always checkpointed."),
    Reward.Input("reward", tooltip="What to raise. It needs a gradient: every two-tower reward has one."),
    io.String.Input("prompts", multiline=True, tooltip="One per line. With images: the caption of each, in their order, or one for all."),
]
_ANY_REWARD = Reward.Input(
    "reward",
    tooltip="What to raise. Objectives that follow its gradient (ReFL, DRaFT, SRPO, …) need one with it, as two-tower rewards have; policy "
    "gradients and the black box take any. Objectives on pairs, likes or images alone do not train on it, SmPO aside: previews show it.",
)
_OPTIONAL = [
    io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
    io.Conditioning.Input("conditioning", optional=True, tooltip="Instead of a clip: one conditioning for all prompts."),
    io.Image.Input("images", optional=True, tooltip="Real images to train from; ImageReFL needs them."),
    Reward.Input(
        "heldout", optional=True, tooltip="A second reward that training never sees: where it falls, the first is being exploited."
    ),
    io.Vae.Input("gradient_vae", optional=True, tooltip="A small VAE (TAESD) for the decoding that needs gradients: far less memory."),
]
_FEATURES = Reward.Input(
    "features",
    optional=True,
    tooltip="For the black-box objective alone: a two-tower reward whose features its surrogate reads. The reward then needs no gradient.",
)
_MEMORY = io.Combo.Input(
    "memory",
    options=MODES,
    default="fast",
    optional=True,
    tooltip="fast: settings as given. balanced: the peak is predicted before the first step, and settings are switched on until it fits "
    "the device: images decoded one by one, activations recomputed, rewards offloaded, the reward in bfloat16 (which rounds it), batches "
    "in parts. small: all of these.",
)
# After all others: saved graphs know widgets by their position
_DATASET = Dataset.Input(
    "dataset",
    optional=True,
    tooltip="Images and captions of a folder, from Captioned Folder, instead of images and prompts: leave both empty. They are cropped to "
    "image_size, as the headless trainer does.",
)
_PAIRS = PreferencePairsSocket.Input(
    "pairs",
    optional=True,
    tooltip="For objectives on preferences: pairs from Make Pairs or Load Pairs, instead of images and prompts. Diffusion-KTO reads them "
    "as liked and disliked images. They are cropped to image_size; 0 keeps theirs.",
)
_OUTPUTS = [
    io.Model.Output("tuned", display_name="MODEL", tooltip="The tuned model: connect it as the tuned part of a Combined KSampler."),
    LoraWeights.Output("lora", display_name="LORA_MODEL", tooltip="For Save Reward LoRA, and the stock Load LoRA Model."),
    Losses.Output("loss", display_name="LOSS_MAP", tooltip="For the stock Plot Loss Graph."),
    io.Image.Output("curves", display_name="curves", tooltip="Reward and held-out reward over training."),
    io.Image.Output("preview", display_name="preview", tooltip="The last preview images."),
    io.String.Output("report", display_name="report", tooltip="Steps, time, memory, and where the files are."),
]


def _split(values: dict[str, Any]) -> dict[str, Any]:
    """Widgets of the run and of the adapter, gathered; the rest as it is."""
    settings = {key: values.pop(widget_name(key)) for key in _OURS}
    targets = [t.strip() for t in values.pop("targets").split(",") if t.strip()]
    lora = build(Lora, {"rank": values.pop("rank"), "alpha": values.pop("alpha"), "targets": targets}, "lora.")
    return {"settings": settings, "lora": lora, **values}


def _shown(node: type[io.ComfyNode], trained: io.NodeOutput) -> io.NodeOutput:
    """With the report drawn on the node."""
    show_text(node, trained.args[-1])
    return trained


class AlignLoraTrain(io.ComfyNode):
    """Any objective."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLAlignTrain",
            display_name="Train LoRA (any objective)",
            category=f"{CATEGORY}/training",
            description="Trains a LoRA with any objective of this pack.",
            search_aliases=["align lora train", "reward fine-tuning", "draft", "srpo", "alignprop", "finetune", "rlhf", "dpo", "grpo"],
            is_experimental=True,
            is_deprecated=True,
            shown=_SHOWN,
            is_output_node=True,
            inputs=[
                *(_ANY_REWARD if socket.id == "reward" else socket for socket in _SOCKETS),
                Objective.Input("objective", tooltip="From an Objective node."),
                *_run_inputs(),
                *_OPTIONAL,
                _FEATURES,
                _MEMORY,
                _DATASET,
                _PAIRS,
            ],
            outputs=_OUTPUTS,
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Train."""
        return _shown(cls, train_in_graph(**_split(values)))


_COMMON = ("refl_share", "diffusion_weight", "guidance_scale", "refl_diffusion", "diffusion_weight_unit")


class ImageReFLTrain(io.ComfyNode):
    """The one node that most people need."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        chosen = [w for w in widgets(ImageReFL, tuple(f.name for f in fields(ImageReFL) if f.name not in _COMMON))]
        return schema(
            node_id="ImageReFLTrain",
            display_name="Train LoRA (ImageReFL)",
            category=f"{CATEGORY}/training",
            description="Trains a LoRA that makes the last sampling steps better by a reward's gradient on noised real images, so that "
            "layout and variety stay the base model's. Use its result as the tuned part of a Combined KSampler.",
            search_aliases=["lora imagerefl train", "reward fine-tuning", "finetune", "rlhf", "preference optimization"],
            is_experimental=True,
            is_deprecated=True,
            shown=_SHOWN,
            is_output_node=True,
            inputs=[
                *_SOCKETS,
                io.Int.Input(
                    "sampler_steps", default=40, min=1, max=1000, tooltip="Sampler steps T of the training grid; the paper uses 40."
                ),
                io.Float.Input(
                    "switch_at",
                    default=0.75,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of the steps that the base model draws: images are noised to this level, and rewards taken after it. "
                    "The paper: step 30 of 40.",
                ),
                *chosen,
                *_run_inputs(),
                *_OPTIONAL,
                _MEMORY,
                _DATASET,
            ],
            outputs=_OUTPUTS,
        )

    @classmethod
    def execute(cls, sampler_steps: int, switch_at: float, **values: Any) -> io.NodeOutput:
        """Train."""
        first = min(sampler_steps - 1, round(switch_at * sampler_steps))
        common = {name: values.pop(widget_name(name)) for name in _COMMON if widget_name(name) in values}
        ranges = {"grad_from": first, "grad_to": sampler_steps - 1, "start_from": first, "start_to": first}
        built = build(OBJECTIVES["imagerefl"], {"steps": sampler_steps, **ranges, **common})
        return _shown(cls, train_in_graph(objective=("imagerefl", built), **_split(values)))


class TrainLora(ImageReFLTrain):
    """`ImageReFLTrain` with names of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return _renamed(super().define_schema(), "ImageReFLTrainLora")

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Train."""
        return super().execute(**{_OLD.get(name, name): value for name, value in values.items()})


class TrainLoraAnyObjective(AlignLoraTrain):
    """`ImageReFLAlignTrain` with names of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return _renamed(super().define_schema(), "ImageReFLTrainAnyObjective")

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Train."""
        return super().execute(**{_OLD.get(name, name): value for name, value in values.items()})


NODES = [TrainLora, TrainLoraAnyObjective, ImageReFLTrain, AlignLoraTrain]
