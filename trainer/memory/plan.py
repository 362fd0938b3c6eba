"""What a training run will take, before it runs: memory by part and moment, denoiser calls and arithmetic, and what makes it less.

The run's own code is taken through one step on tensors without memory (dry.py), over modules that have shapes and no
values, so what is counted is what will be allocated. Not counted: what a device's libraries keep for themselves, and what
its allocator cannot use; both are an allowance that is stated.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..config import ConfigError
from ..data.batches import Images
from ..data.latents import LATENTS_KEPT, LatentsInMemory
from ..data.samples import Samples, batch_size_for
from ..denoiser import Denoiser, WrappedDenoiser
from ..generate import Generation
from ..generate import batch_size_for as images_at_a_time
from ..guidance import Switch
from ..models.diffusers_policy import DiffusersPolicy
from ..models.prompts import EMBEDDINGS_KEPT
from ..objectives.base import RunContext
from ..rewards.base import RewardModel
from ..runtime.processes import ALONE, Processes
from ..training.config import TrainConfig, Watch
from ..training.nfe import CountingPolicy
from ..training.optimizers import STATE_BYTES
from ..training.optimizers import Name as OptimizerName
from ..training.parts import Parts
from ..training.run import Run
from .dry_run import META, Tally, dry
from .offload import tensors, waiting_text_towers

GB = 1e9
TRACED = 32  # micro-batches that are looked at for the most expensive one, and for the mean number of calls
WEIGHTS = (
    *("denoiser weights", "autoencoder weights", "autoencoder's encoder weights", "text encoder weights"),
    *("reward weights", "other rewards' weights"),
)


@dataclass(frozen=True)
class Models:
    """What a run is made of, on the meta device; `others` are rewards that watch, or whose features are read."""

    policy: DiffusersPolicy
    reward: RewardModel
    features: Any = None
    others: Sequence[RewardModel] = ()
    pictures: int = 0  # that are encoded, and whose latents are kept
    prompts: int = 0  # distinct ones, whose embeddings are kept


@dataclass(frozen=True)
class Plan:
    """Bytes at the highest moment by part, arithmetic (FLOPs) of an optimizer step and of a look by part, and a step's denoiser calls."""

    parts: dict[str, int]
    moment: str
    allowance: int
    moments: dict[str, int]
    flops: dict[str, float]
    forwards: float
    backwards: float
    files: dict[str, int]
    steps: int
    look_flops: dict[str, float]
    looks: int
    waiting: dict[str, int]  # bytes on the CPU beside an accelerator

    @property
    def counted(self) -> int:
        """Bytes of tensors at the highest moment."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """The same with the allowance."""
        return self.counted + self.allowance


def allowance(counted: int, device: str) -> int:
    """Bytes beside the tensors: on a GPU the driver's context, the libraries' workspaces and what the allocator cannot use."""
    if device.startswith("cpu"):
        return int(0.9e9 + 0.05 * counted)  # Python with torch, diffusers and transformers; the allocator's slack
    return int(0.8e9 + 0.06 * counted)


# -- the dry step ----------------------------------------------------------------------------------------------------


class _Watched(CountingPolicy):
    """A policy under a Tally. Calls without gradient cost the same each time, so one is made and the others are remembered;
    of many calls with gradient the first two are made, and each of the others keeps as many bytes as they did."""

    def __init__(self, policy: DiffusersPolicy, tally: Tally) -> None:
        super().__init__(policy)
        self.tally, self.inner = tally, policy
        self.rows: Counter[str] = Counter()
        self._plain: dict[Any, int] = {}
        self._graphs: Counter[Any] = Counter()
        self._kept: dict[Any, int] = {}
        self._skipped: Any = WeakIdKeyDictionary()  # by the state: a forward that is computed again must be what it was

    def _counted(self, denoiser: Denoiser, adapter: str, guidance_scale: float) -> Denoiser:
        def denoise(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
            key = (len(x), guidance_scale, adapter)
            rows = len(x) * (1 if guidance_scale == 1 else 2)
            if not torch.is_grad_enabled():
                return self._without_gradient(denoiser, x, sigma, key, rows)
            if x not in self._skipped:
                self._graphs[key] += 1
                self._skipped[x] = self._graphs[key] > 2
            if self._skipped[x]:
                return _Stand.apply(x, self.inner.parameters()[0], self._kept[key])  # pyright: ignore[reportReturnType]
            before = self.tally.total
            with self.tally.during("denoiser"):
                output = denoiser(x, sigma)
            self._kept.setdefault(key, self.tally.total - before - output.nbytes)
            self.rows["forward"] += rows
            self.rows["back"] += rows
            self.tally.going_back(output, "denoiser, going back")
            return output

        return WrappedDenoiser(denoiser, denoise)

    def _without_gradient(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, key: Any, rows: int) -> Tensor:
        done = (most for (n, *same), most in self._plain.items() if n >= len(x) and same == [*key[1:]])
        if self.tally.total <= max(done, default=-1):
            return torch.empty_like(x, device=META, dtype=torch.float32)
        self._plain[key] = self.tally.total + (1 << 20)
        self.rows["forward"] += rows
        with self.tally.during("denoiser, without gradient"):
            return denoiser(x, sigma)

    def decode(self, latents: Tensor) -> Tensor:
        """The policy's, counted."""
        with self.tally.during("decoder"):
            images = self.policy.decode(latents)
        self.rows["decoded"] += len(latents)
        self.tally.going_back(images, "decoder, going back")
        return images


class _Stand(torch.autograd.Function):
    """In the place of a denoiser call: a result of its shape, and as many bytes kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, kept: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(torch.empty(max(kept, 0), dtype=torch.uint8, device=META))
        return torch.empty(x.shape, dtype=torch.float32, device=META)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None, None


class _Judged:
    """A reward under a Tally."""

    def __init__(self, reward: Any, tally: Tally) -> None:
        self.reward, self.tally = reward, tally
        self.differentiable, self.takes_prefixes = reward.differentiable, reward.takes_prefixes

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._during(lambda: self.reward(images, prompts))

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        return self._during(lambda: self.reward.scores(images, prompts, prefixes))

    def image_features(self, images: Tensor) -> Tensor:
        return self._during(lambda: self.reward.image_features(images))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return self._during(lambda: self.reward.text_features(prompts))

    def _during(self, call: Callable[[], Tensor]) -> Tensor:
        with self.tally.during("reward"):
            result = call()
        self.tally.going_back(result, "reward, going back")
        return result


class Unknown(RewardModel):
    """A reward whose memory nobody knows: it takes none."""

    supports_gradient_checkpointing = True

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W), B prompts -> (B,)."""
        return images.flatten(1).mean(1)


class _Sketch:
    """The course of a step without a network: which calls an objective makes, on latents of one pixel."""

    differentiable = takes_prefixes = True

    def __init__(self, policy: DiffusersPolicy) -> None:
        self.space, self.adapters, self.sigmas, self.add_noise = policy.space, policy.adapters, policy.sigmas, policy.add_noise
        self.latent_shape = (max(3, policy.latent_shape[0]), 1, 1)
        self.weight = nn.Parameter(torch.zeros(()))
        self.forwards = self.backwards = 0
        self.device = torch.device("cpu")

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0) -> Denoiser:
        rows = 1 if guidance_scale == 1 else 2

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            self.forwards += rows * len(x)
            output = 0 * x + self.weight
            if output.requires_grad:
                output.register_hook(lambda _: setattr(self, "backwards", self.backwards + rows * len(x)))  # pyright: ignore[reportUnknownLambdaType]
            return output

        found: Any = denoise if adapter == "tuned" else torch.no_grad()(denoise)
        found.rows = lambda index: found  # pyright: ignore[reportUnknownLambdaType]
        return found

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, noise: Tensor, steps: int) -> Tensor:
        return noise

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)[:, None].expand(-1, len(prefixes))

    def image_features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 3)


def _bounded(config: TrainConfig) -> TrainConfig:
    """The run without what is written to disk or asked of an oracle many times; neither changes the highest moment."""
    given = dict(config.objective)
    known = {f.name for f in fields(type(config.method))}  # type: ignore[arg-type]
    small = {"buffer_gb": 0.0, "collect_every": 1, "queries": (max(2, config.batch_size),), "epochs": 1}
    given |= {name: value for name, value in small.items() if name in known}
    return replace(config, objective=given)


def _trace(config: TrainConfig, models: Models, samples: Samples, folder: Path, processes: Processes) -> tuple[float, float, int]:
    """Mean forwards and backwards of the denoiser in a micro-batch, and the number of the most expensive one."""
    seen: list[tuple[int, int]] = []
    sketch = _Sketch(models.policy)
    run = RunContext(sketch, sketch, sketch, folder=folder, prompts=samples.prompts)  # pyright: ignore[reportArgumentType]
    loss = config.method.begin(run)
    share = processes.share(config.batch_size)
    for number in range(min(TRACED, config.steps * config.gradient_accumulation_steps)):
        sketch.forwards = sketch.backwards = 0
        batch = samples.batch(config.seed, number // config.gradient_accumulation_steps, number, config.batch_size, share)
        if isinstance(batch, Images):
            batch = replace(batch, latents=torch.zeros(len(share), *sketch.latent_shape))
        value, _ = loss(batch)
        value.backward()
        seen.append((sketch.forwards, sketch.backwards))
    forwards, backwards = (sum(column) / len(seen) for column in zip(*seen))
    return forwards, backwards, max(range(len(seen)), key=lambda i: (seen[i][1], seen[i][0]))


def plan(config: TrainConfig, models: Models, tally: Tally, processes: Processes = ALONE) -> Plan:
    """What the run will take. `tally` is running, and remembers operations from one plan to the next."""
    policy, asked = models.policy, config
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(_bounded(config), out=str(folder), watch=Watch(), tracker="", optimizer="adamw")
        parked = config.offload_encoders and not config.device.startswith("cpu")
        policy.autoencoder.slicing = config.vae_slicing
        prompts = tuple(f"prompt {i}" for i in range(max(2, config.batch_size)))
        picture = torch.empty(1, *policy.latent_shape, device=META)
        samples = Samples(prompts, LatentsInMemory(*[picture.expand(len(prompts), -1, -1, -1)] * 2))
        latents = 2 * picture.nbytes * models.pictures  # mean and standard deviation
        latents = min(latents, LATENTS_KEPT) if config.cache else latents
        forwards, backwards, worst = _trace(config, models, samples, folder, processes)
        policy.prompts.clear()
        reward = _Judged(models.reward, tally)
        features = _Judged(models.features, tally) if models.features is not None else None
        with dry(tally):
            run = Run(config, Parts(policy, samples, reward, features, processes=processes))
            models.reward.gradient_checkpointing(config.gradient_checkpointing_reward)
            watched = _Watched(policy, tally)
            if parked:
                tally.clear()
            else:
                _hold_weights(tally, models, run)
                _hold_encoders(tally, policy)
                _hold_rewards(tally, models)
            peaks: dict[str, tuple[int, Counter[str], str]] = {}

            def phase(name: str) -> None:
                peaks[name] = (tally.peak, tally.at_peak, tally.moment)
                tally.forget_peak()

            tally.forget_peak()
            if models.pictures and config.images:
                if parked:
                    tally.hold(tensors(*policy.autoencoder.encoder), "autoencoder's encoder weights")
                with tally.during("autoencoder's encoder"):
                    together = min(batch_size_for(policy.image_size), models.pictures)
                    policy.encode(torch.empty(together, 3, *policy.image_size, device=META))
                phase("encoding pictures")
                if config.device.startswith("cpu"):  # where they wait
                    tally.hold([torch.empty(latents, dtype=torch.uint8, device=META)], "pictures' latents")
            if parked:
                tally.clear()
                _hold_encoders(tally, policy)
                tally.forget_peak()
            with tally.during("text encoders"):
                row = sum(value.nbytes for value in policy.prompts.conditioning((*prompts, "")).values()) // (len(prompts) + 1)
            known = min(row * models.prompts, EMBEDDINGS_KEPT) if config.cache else row * models.prompts
            phase("encoding prompts")
            if config.device.startswith("cpu"):  # where they wait
                embeddings = torch.empty(known, dtype=torch.uint8, device=META)
                tally.hold([embeddings], "prompts' embeddings")
            if parked:
                tally.clear()
                _hold_weights(tally, models, run)
                tally.release("autoencoder's encoder weights")
            state = _state(run, asked.optimizer, tally)
            waiting = {} if config.device.startswith("cpu") else {
                "pictures' latents": latents,
                "prompts' embeddings": known,
            }  # fmt: skip
            if parked:
                waiting |= {"encoders": sum(t.nbytes for t in tensors(*policy.encoders())), "rewards": 0}
                tally.forget_peak()
                wordings, shown = config.method.wordings, asked.watch.count * (asked.watch.every > 0)
                waiting["rewards"] += _read(
                    tally,
                    [r for r in (models.reward, models.features) if r is not None],
                    wordings(prompts),
                    models.prompts * len(wordings([""])) + shown,
                    "reward weights",
                )
                waiting["rewards"] += _read(tally, models.others, prompts, shown, "other rewards' weights")
                waiting["rewards"] += tally.live["other rewards' weights"]
                tally.release("other rewards' weights")
                phase("rewards reading prompts")
            tally.forget_peak()
            rows, flops = _step(run, watched, reward, samples, worst, tally)
            phase("a training step")
            if asked.watch.every:
                judges = [reward, *(_Judged(r, tally) for r in models.others)]
                comes = _apart(models.others, asked.watch.count) if parked else []
                _look(asked.watch, run, watched, prompts, judges, lambda: tally.hold(comes, "other rewards' weights"))
                phase("a look of the watch")
            del state
        best = max(peaks.values(), key=lambda peak: peak[0])
        moments = {name: peak[0] for name, peak in peaks.items()}
    per_row = {"denoiser": flops["denoiser"] / max(1, rows["forward"]), "back": flops["back"] / max(1, rows["back"])}
    arithmetic = {
        "denoiser": config.gradient_accumulation_steps * (forwards * per_row["denoiser"] + backwards * per_row["back"]),
        **{part: config.gradient_accumulation_steps * flops[part] for part in ("decoder", "reward")},
    }
    looks, calls = (-(-asked.steps // asked.watch.every) + 1, _calls_of_a_look(asked, policy)) if asked.watch.every else (0, 0)
    look = {
        "denoiser": calls * per_row["denoiser"],
        "decoder": asked.watch.count * asked.watch.images * flops["decode"] / max(1, rows["decoded"]),
    }
    trained = sum(p.numel() for p in policy.parameters())
    state = trained * (4 + STATE_BYTES[asked.optimizer] + 4 * (config.ema > 0))
    parts = {part: size for part, size in best[1].items() if size}
    return Plan(
        parts, best[2], allowance(sum(parts.values()), asked.device), moments, arithmetic, forwards * config.gradient_accumulation_steps,
        backwards * config.gradient_accumulation_steps, {"lora.safetensors": 4 * trained, "checkpoint.pt": state}, config.steps,
        look, looks, waiting,
    )  # fmt: skip


def _calls_of_a_look(config: TrainConfig, policy: DiffusersPolicy) -> int:
    """Denoiser calls of one image at a look of the watch; guidance makes two of one."""
    watch, objective = config.watch, config.method
    steps = watch.steps or objective.steps
    k = Switch.parse(watch.switch).index(policy.sigmas(steps))
    return watch.count * watch.images * (k * (1 + (watch.guidance_scale != 1)) + (steps - k) * (1 + (objective.guidance_scale != 1)))


@torch.no_grad()
def _look(
    watch: Watch, run: Run, policy: _Watched, encoded: Sequence[str], rewards: Sequence[Any], judges_come: Callable[[], None]
) -> None:
    """What the watch draws and judges at a time, once."""
    count = watch.count * watch.images
    drawn = min(count, images_at_a_time(policy.inner, Generation()))
    prompts = [encoded[i % len(encoded)] for i in range(count)]
    noise = torch.empty(drawn, *policy.latent_shape, device=META)
    policy.denoiser(prompts[:drawn], adapter="base", guidance_scale=watch.guidance_scale)(
        noise, policy.sigmas(run.config.method.steps)[:1].expand(drawn)
    )
    policy.decode(noise)
    images = torch.empty(min(count, 32), 3, *policy.inner.image_size, device=META)
    judges_come()
    for reward in rewards:
        reward(images, prompts[: len(images)])


def _hold_weights(tally: Tally, models: Models, run: Run) -> None:
    """Nothing is live but what a run holds from its first step to its last."""
    tally.clear()
    policy = models.policy
    tally.hold(tensors(policy.network), "denoiser weights")
    tally.hold(policy.parameters(), "adapter")
    tally.hold(policy.adapters.original.values(), "original weights")
    tally.hold(tensors(policy.vae), "autoencoder weights")
    tally.hold(tensors(*policy.autoencoder.encoder), "autoencoder's encoder weights")
    if run.ema:
        tally.hold(run.ema.values.values(), "moving average")


def _hold_encoders(tally: Tally, policy: DiffusersPolicy) -> None:
    tally.hold(tensors(*policy.prompts.encoders), "text encoder weights")


def _apart(rewards: Sequence[RewardModel], count: int) -> list[Tensor]:
    """Weights of rewards without the text towers that wait on the CPU in a run of `count` prompts."""
    waits = {id(t) for reward in rewards for r in waiting_text_towers(reward, count) for t in tensors(r.text)}
    return [t for t in tensors(*rewards) if id(t) not in waits]


def _read(tally: Tally, rewards: Sequence[RewardModel], texts: Sequence[str], count: int, part: str) -> int:
    """Rewards come to the device and read the run's texts, `count` in all; returns the bytes of the text towers that wait afterwards."""
    tally.hold(_apart(rewards, count), part)
    waiting = 0
    for reader in (r for reward in rewards for r in waiting_text_towers(reward, count)):
        words = tensors(reader.text)
        waiting += sum(t.nbytes for t in words)
        tally.hold(words, "rewards' text towers")
        reader.forget()
        with tally.during("reward"):
            reader.remember(texts)
        tally.release("rewards' text towers")
    return waiting


def _hold_rewards(tally: Tally, models: Models) -> None:
    tally.hold(tensors(models.reward, models.features), "reward weights")
    tally.hold(tensors(*models.others), "other rewards' weights")


def _state(run: Run, name: OptimizerName, tally: Tally) -> list[Tensor]:
    """What the optimizer keeps from its first step on; 8 bit counts as its table says, its kernels know no meta device."""
    if STATE_BYTES[name] != STATE_BYTES["adamw"]:
        count = sum(p.numel() for p in run.policy.parameters())
        kept = [torch.empty(STATE_BYTES[name] * count, dtype=torch.uint8, device=META)]
        tally.hold(kept, "optimizer state")
        return kept
    for parameter in run.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with tally.during("optimizer state"):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return []


def _step(run: Run, policy: _Watched, reward: Any, samples: Samples, number: int, tally: Tally) -> tuple[Counter[str], Counter[str]]:
    """The most expensive micro-batch of the run, with everything alive that is alive then; rows and FLOPs of its calls."""
    c, parameters = run.config, list(policy.parameters())
    if c.gradient_accumulation_steps > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        tally.hold([p.grad for p in parameters if p.grad is not None], "gradients")
    hooks = [p.register_post_accumulate_grad_hook(lambda p: tally.hold([p.grad], "gradients")) for p in parameters]
    batch = samples.batch(c.seed, number // c.gradient_accumulation_steps, number, c.batch_size, run.processes.share(c.batch_size))
    tally.flops.clear()
    try:
        loss, _ = c.method.begin(replace(run.context, policy=policy, reward=reward))(batch)
        (loss / c.gradient_accumulation_steps).backward()
        del loss
    finally:
        for hook in hooks:
            hook.remove()
    with tally.during("optimizer"):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    tally.now = "rest"
    flops = Counter({
        "denoiser": sum(v for k, v in tally.flops.items() if k.startswith("denoiser") and "back" not in k),
        "back": tally.flops["denoiser, going back"],
        "decode": tally.flops["decoder"],
        **{part: sum(v for k, v in tally.flops.items() if k.startswith(part)) for part in ("decoder", "reward")},
    })  # fmt: skip
    return policy.rows.copy(), flops


# -- what makes it smaller -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One setting that takes less memory, and what it costs."""

    key: str
    value: Any
    cost: str

    def applied(self, config: TrainConfig) -> TrainConfig | None:
        """The config with it; None where it is so already, or where there is no such key."""
        table, _, name = self.key.rpartition(".")
        inside: Any = getattr(config, table) if table else config
        if getattr(inside, name, self.value) == self.value:
            return None
        inside = replace(inside, **{name: self.value})
        return replace(config, **{table: inside}) if table else inside

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.key}={str(self.value).lower() if isinstance(self.value, bool) else self.value}"


# What costs the least time comes first; what changes the result comes last.
SETTINGS = (
    Setting("gradient_checkpointing_vae", True, "the autoencoder's decoder is computed twice"),
    Setting("vae_slicing", True, "images are decoded one at a time"),
    Setting("gradient_checkpointing_denoiser", True, "the denoiser is computed twice where it carries a gradient"),
    Setting("gradient_checkpointing_reward", True, "the reward is computed twice"),
    Setting("offload_encoders", True, "what no step needs waits on the CPU"),
    Setting("reward_dtype", "bfloat16", "rounds the reward"),
    Setting("model_options.dtype", "bfloat16", "rounds the model's weights"),
)


def halved(config: TrainConfig, processes: int = 1) -> TrainConfig | None:
    """The same samples per optimizer step in twice as many micro-batches; None where a micro-batch cannot be halved."""
    if config.batch_size % (2 * processes):
        return None
    return replace(config, batch_size=config.batch_size // 2, gradient_accumulation_steps=2 * config.gradient_accumulation_steps)


Planner = Callable[[TrainConfig], Plan]


def savings(config: TrainConfig, planned: Planner, processes: int = 1) -> list[tuple[str, str, int]]:
    """Flag, cost and bytes saved of each setting by itself that saves a hundredth or more."""
    before, found = planned(config).total, list[tuple[str, str, int]]()
    options = [(s.flag, s.cost, s.applied(config)) for s in SETTINGS]
    smaller = halved(config, processes)
    if smaller is not None:
        options.append(
            (
                f"--batch_size={smaller.batch_size} --gradient_accumulation_steps={smaller.gradient_accumulation_steps}",
                "more, smaller micro-batches",
                smaller,
            )
        )
    for flag, cost, changed in options:
        saved = before - planned(changed).total if changed is not None else 0
        if saved > before / 100:
            found.append((flag, cost, saved))
    return found


def fit(
    config: TrainConfig, gigabytes: float, given: Sequence[str], planned: Planner, processes: int = 1
) -> tuple[TrainConfig, list[str], Plan]:
    """The config with the fewest memory settings, in order, that fits `gigabytes`; the flags that were added; its plan.

    Keys in `given` are left as they are, but for batch_size and gradient_accumulation_steps, which keep their product. Raises
    ConfigError with the least that it takes where nothing fits.
    """
    found, added = planned(config), list[str]()
    for setting in (*SETTINGS, *SETTINGS):  # twice: one setting moves the highest moment to where another one helps
        if found.total <= gigabytes * GB:
            return config, added, found
        changed = setting.applied(config) if setting.key not in given else None
        less = planned(changed) if changed is not None else found
        if changed is not None and less.total < 0.99 * found.total:
            config, found, added = changed, less, [*added, setting.flag]
    while found.total > gigabytes * GB:
        changed = halved(config, processes)
        if changed is None:
            fixed = [s.flag for s in SETTINGS if s.key in given and s.applied(config) is not None]
            raise ConfigError(
                f"vram = {gigabytes:g}: the least that this run takes is {found.total / GB:.1f} GB, "
                f"with {' '.join(added) or 'its settings'} "
                f"({found.moment}); a lower image_size, a smaller lora.rank or a smaller model takes less"
                + (f", and so would {' '.join(fixed)}, which the config sets otherwise" if fixed else "")
            )
        config, found = changed, planned(changed)
        added = [
            *(flag for flag in added if not flag.startswith("--batch_size")),
            f"--batch_size={config.batch_size} --gradient_accumulation_steps={config.gradient_accumulation_steps}",
        ]
    return config, added, found


def table(found: Plan, device: str) -> str:
    """The plan as text."""
    lines = [f"memory, GB, at the highest moment ({found.moment}):"]
    for part, size in sorted(found.parts.items(), key=lambda item: -item[1]):
        if size >= 0.0005 * GB:
            lines.append(f"  {_NAMES.get(part, part):<28}{size / GB:>9.3f}")
    beside = "Python and its libraries, 5 % slack" if device.startswith("cpu") else "context and workspaces, 6 % fragmentation"
    lines += [f"  {'allowance: ' + beside:<28}{found.allowance / GB:>9.3f}", f"  {'total':<28}{found.total / GB:>9.3f}"]
    lines.append("highest of each phase: " + ", ".join(f"{name} {size / GB:.2f}" for name, size in found.moments.items()))
    if sum(found.waiting.values()) >= 0.05 * GB:
        held = ", ".join(f"{part} {size / GB:.2f}" for part, size in found.waiting.items() if size >= 0.005 * GB)
        lines.append(f"waiting on the CPU meanwhile, GB: {held}")
    teras = {part: value / 1e12 for part, value in found.flops.items()}
    lines.append(
        f"an optimizer step: {found.forwards:.0f} denoiser forwards and {found.backwards:.0f} backwards of one image; "
        f"{_short(sum(teras.values()))} TFLOP ({', '.join(f'{part} {_short(value)}' for part, value in teras.items())})"
    )
    whole = found.steps * sum(teras.values()) / 1e3 + found.looks * sum(found.look_flops.values()) / 1e15
    looks = f" and {found.looks} looks of the watch" if found.looks else ""
    lines.append(f"the run: {found.steps} steps{looks}, {_short(whole)} PFLOP")
    lines.append("files: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found.files.items()))
    return "\n".join(lines)


REACHED = (0.3, 0.8)  # of the speed of a matrix product, by steps of the models and objectives in docs/real-models.md


def speed(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product on a device, the fastest seen in `seconds`."""
    side = 1024 if device.startswith("cpu") else 8192
    a = torch.ones(side, side, dtype=dtype, device=device)
    times, begin = list[float](), time.monotonic()
    while len(times) < 3 or time.monotonic() - begin < seconds:
        start = time.monotonic()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.monotonic() - start)
    return 2 * side**3 / min(times)


def duration(found: Plan, config: TrainConfig, speeds: Mapping[str, float]) -> str:
    """How long a step and the run take where matrix products run at `speeds`, FLOP/s by dtype."""
    step, look = (at_full_speed(flops, config, speeds) for flops in (found.flops, found.look_flops))
    run = found.steps * step + found.looks * look
    rates = ", ".join(f"{name} {_short(value / 1e12)}" for name, value in speeds.items())
    return (
        f"time on this {config.device}: {_times(step)} a step, {_times(run)} the run, encoding aside (a matrix product runs at "
        f"{rates} TFLOP/s; steps reach {REACHED[0]:.0%} to {REACHED[1]:.0%} of that)"
    )


def at_full_speed(flops: Mapping[str, float], config: TrainConfig, speeds: Mapping[str, float]) -> float:
    """Seconds that arithmetic by part would take at the speed of matrix products."""
    rate = {part: speeds[config.model_options.dtype] for part in ("denoiser", "decoder")} | {"reward": speeds[config.reward_dtype]}
    return sum(value / rate[part] for part, value in flops.items())


def _times(seconds: float) -> str:
    low, high = seconds / REACHED[1], seconds / REACHED[0]
    size, unit = next((s, u) for s, u in ((86400, "days"), (3600, "h"), (60, "min"), (0, "s")) if high >= 2 * s)
    return f"{low / max(size, 1):.2g} to {high / max(size, 1):.2g} {unit}"


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_NAMES = {
    "denoiser": "denoiser's activations",
    "decoder": "decoder's activations",
    "reward": "reward's activations",
    "text encoders": "text encoders' activations",
    "autoencoder's encoder": "autoencoder's activations",
    "rest": "latents on the way",
}
