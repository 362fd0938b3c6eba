"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from ..config import ConfigError, build, likely, plain
from ..guidance import Switch
from ..models.load import ModelOptions
from ..objectives import OBJECTIVES, Objective
from ..policy import Lora
from ..sampling import Method
from .optimizers import Name as OptimizerName
from .tracker import Name as TrackerName


@dataclass(frozen=True)
class Watch:
    """How a run is evaluated while it trains, and when it ends early.

    The best checkpoint has the highest held-out reward among those that keep `diversity` of the diversity before training. A run
    stops after `patience` evaluations in a row that score above the best one by the training reward and below it by the held-out
    one: the policy is then over-optimising the training reward.
    """

    every: int = field(default=0, metadata={"min": 0, "help": "optimizer steps between evaluations; 0: none"})
    heldout: str = field(default="", metadata={"help": "held-out reward, named as `reward`; not the one trained on"})
    prompts: str = field(default="", metadata={"help": "text file, one prompt per line; default: the first training prompts"})
    reference: str = field(
        default="", metadata={"help": "images that FID and LogCov compare with: a folder, or `none`; default: the training images"}
    )
    count: int = field(default=8, metadata={"min": 1, "help": "number of prompts"})
    images: int = field(default=4, metadata={"min": 2, "help": "images per prompt"})
    steps: int = field(default=0, metadata={"min": 0, "max": 1000, "help": "sampler steps; 0: as in training"})
    switch: str = field(
        default="0", metadata={"help": "step where the tuned model takes over from the base: 0 tuned alone, 12, 75%, sigma=0.63"}
    )
    guidance_scale: float = field(
        default=7.5, metadata={"min": 0.0, "max": 30.0, "help": "guidance scale of the base model before the switch"}
    )
    tuned_guidance_scale: float | None = field(
        default=None,
        metadata={"min": 0.0, "max": 30.0, "help": "guidance scale of the tuned part; none: as in training, 1 with tuned_model"},
    )
    tuned_model: str = field(
        default="",
        metadata={
            "help": "another model of the family that draws the tuned part, with the LoRA: the turbo model of the base that is trained"
        },
    )
    tuned_parts: str = field(
        default="", metadata={"help": "diffusers folder with the schedule of a tuned_model that is a file of the network alone"}
    )
    tuned_steps: int = field(default=0, metadata={"min": 0, "max": 1000, "help": "sampler steps of tuned_model's own schedule"})
    tuned_method: Method | None = field(
        default=None, metadata={"help": "sampler of the tuned part: ddpm, ddim or dpmpp_2m; none: ddpm, and ddim with tuned_model"}
    )
    diversity: float = field(
        default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "share of the initial diversity that the best checkpoint must keep"}
    )
    patience: int = field(
        default=0, metadata={"min": 0, "help": "evaluations in a row with over-optimisation that end the run; 0: never ends it"}
    )

    def __post_init__(self) -> None:
        Switch.parse(self.switch)  # raises ValueError
        if self.tuned_model and not self.tuned_steps:
            raise ValueError("tuned_model has a schedule of its own: give tuned_steps, such as 8")
        unread = next((key for key in ("tuned_steps", "tuned_parts") if getattr(self, key) and not self.tuned_model), "")
        if unread:
            raise ValueError(f"{unread} is of another model: give tuned_model")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Objective, adapter, model options and watch are tables of their own."""

    out: str = field(metadata={"help": "output folder"})
    objective: dict[str, Any] = field(
        default_factory=lambda: {"name": "imagerefl"}, metadata={"help": "table: name and the objective's fields"}
    )
    model: str = field(default="demo", metadata={"help": "diffusers folder, or `demo` for the embedded model"})
    reward: str = field(
        default="demo-proxy",
        metadata={
            "help": "a name of `rewards list`, NAME@FILE, a folder, a Python file, a judge's URL, or a sum: hpsv2.1=1, pickscore=0.5"
        },
    )
    standardise: bool = field(default=True, metadata={"help": "(reward − mean) / std, with the statistics of the base model's images"})
    images: str = field(
        default="",
        metadata={"help": "images with .txt captions (subfolders N_name count N times), CSV, JSONL, `hf:DATASET[:split]`, or `demo`"},
    )
    prompts: str = field(default="", metadata={"help": "text file, one prompt per line, where no images are used"})
    pairs: str = field(
        default="",
        metadata={
            "help": "pairs: CSV or JSONL with columns chosen, rejected, prompt, `hf:DATASET[:split]`, or a folder of liked/, disliked/"
        },
    )
    labels: str = field(
        default="",
        metadata={
            "help": "liked and disliked images: CSV or JSONL with a column label, `hf:DATASET[:split]`, or a folder with liked/, disliked/"
        },
    )
    image_size: int = field(default=0, metadata={"min": 0, "help": "pixels of the square training images; 0: the model's own size"})
    buckets: bool = field(
        default=False, metadata={"help": "aspect ratio buckets: images of about image_size² pixels, one shape per micro-batch"}
    )
    model_options: ModelOptions = field(default_factory=ModelOptions, metadata={"help": "table: how the model's files are loaded"})
    cache: str = field(default="", metadata={"help": "folder for encoded images and prompts; runs may share it"})
    tune: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "lora trains an adapter; full trains every weight of the denoiser and saves the differences"}
    )
    lora: Lora = field(default_factory=Lora, metadata={"help": "table: the adapter"})
    delta_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of the differences that tune = full saves; bfloat16 halves the file, error up to 0.4 %"}
    )
    consistency: str = field(default="", metadata={"help": "consistency LoRA (LCM-LoRA) that an objective may estimate x0 with, or `demo`"})
    training_adapter: str = field(
        default="",
        metadata={"help": "LoRA that undoes a model's distillation: on while training, off in evaluations, and not in the result"},
    )
    gradient_vae: str = field(
        default="",
        metadata={"help": "AutoencoderTiny (TAESD) that reward gradients go through: a folder, a .safetensors file, or `demo`"},
    )
    features: str = field(default="", metadata={"help": "two-tower reward whose features the surrogate of a black-box objective reads"})
    steps: int = field(default=100, metadata={"min": 1, "help": "optimizer steps"})
    budget: int = field(
        default=0,
        metadata={"min": 0, "help": "function evaluations (NFE) that end training: 1 per denoiser forward, 2 per backward; 0: no limit"},
    )
    batch_size: int = field(default=8, metadata={"min": 1, "help": "samples per micro-batch, summed over all processes"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"min": 1, "help": "micro-batches per optimizer step; gradients are averaged"}
    )
    optimizer: OptimizerName = field(
        default="adamw", metadata={"help": "adamw, adamw-fused (one kernel), or adamw-8bit (a quarter of its memory; needs bitsandbytes)"}
    )
    learning_rate: float = field(default=1e-4, metadata={"min": 0.0, "help": "AdamW learning rate"})
    lr_warmup_steps: int = field(default=0, metadata={"min": 0, "help": "steps of linear learning rate warm-up"})
    weight_decay: float = field(default=0.0, metadata={"min": 0.0, "help": "AdamW weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"min": 0.0, "help": "gradient clipping; 0: off"})
    ema: float = field(
        default=0.0, metadata={"min": 0.0, "max": 0.99999, "help": "decay of the EMA of the weights that is saved; 0: no EMA"}
    )
    seed: int = field(default=0, metadata={"min": 0, "help": "random seed"})
    save_every: int = field(default=50, metadata={"min": 1, "help": "optimizer steps between checkpoints"})
    snapshot_every: int = field(
        default=0, metadata={"min": 0, "help": "optimizer steps between LoRA files that are kept, lora-000015.safetensors; 0: none"}
    )
    gradient_checkpointing_denoiser: bool = field(
        default=False, metadata={"help": "recompute the denoiser's activations: less memory, more time"}
    )
    gradient_checkpointing_vae: bool = field(default=False, metadata={"help": "recompute the VAE decoder's activations"})
    gradient_checkpointing_reward: bool = field(default=False, metadata={"help": "recompute the reward's activations"})
    vae_slicing: bool = field(default=False, metadata={"help": "decode one image at a time: the decoder's memory is one image's"})
    offload_encoders: bool = field(
        default=True,
        metadata={"help": "keep encoders, rewards' text towers and, between evaluations, the held-out reward on the CPU while training"},
    )
    merge_rollouts: bool = field(
        default=True, metadata={"help": "merge the LoRA into the weights during rollouts without gradient (float32 weights only)"}
    )
    channels_last: bool = field(default=False, metadata={"help": "channels-last memory format of convolutions, for tensor cores"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the denoiser's blocks: minutes at the start, faster steps"})
    deterministic: bool = field(
        default=False,
        metadata={"help": "on a GPU: PyTorch's deterministic algorithms and no TF32, so that a run repeats bit for bit; slower"},
    )
    reward_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of the training reward's weights: float32 or bfloat16"}
    )
    vram: float = field(
        default=0.0, metadata={"min": 0.0, "help": "GB that the run must fit in: memory settings are switched on until it does; 0: off"}
    )
    watch: Watch = field(
        default_factory=Watch, metadata={"help": "table: evaluation by a held-out reward, best checkpoint, early stopping"}
    )
    allow_remote: bool = field(
        default=False, metadata={"help": "let a judge that is named by its URL be on another machine: images are sent there"}
    )
    tracker: TrackerName = field(default="", metadata={"help": "tensorboard or wandb, beside log.jsonl"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps or xpu"})

    def __post_init__(self) -> None:
        """Refuse a table that describes no objective, and a folder without a name: it would be the current one."""
        if not self.out:
            raise ConfigError("out is empty: give the output folder")
        _ = self.method

    @cached_property
    def method(self) -> Objective:
        """The objective that the table names."""
        table = dict(self.objective)
        name = table.pop("name", None)
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise ConfigError(f"objective.name = {name!r}: {likely(str(name), OBJECTIVES)}use one of {', '.join(OBJECTIVES)}")
        return build(OBJECTIVES[name], table, "objective.")

    def describe(self) -> dict[str, Any]:
        """The settings that decide the result, for metadata and for comparison on resume."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in NEUTRAL}


_FILES = ("out", "save_every", "snapshot_every", "tracker", "device", "cache", "allow_remote")
_MEMORY = ("vram", "vae_slicing", "offload_encoders", *(f"gradient_checkpointing_{part}" for part in ("denoiser", "vae", "reward")))
_SPEED = ("merge_rollouts", "channels_last", "compile", "deterministic")
NEUTRAL = frozenset((*_FILES, *_MEMORY, *_SPEED))
"""Settings that change neither random draws nor, except for rounding, results. A run may resume with others."""
