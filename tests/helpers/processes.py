"""Toy runs in several processes, shared by the tests of what they must agree on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import diffusers.utils.logging
import torch
import transformers.utils.logging
from helpers.family import SMALL, Family, Towers, WithLoser
from helpers.losses import batch_of, loss_of

from trainer.__main__ import main
from trainer.commands import train as commands
from trainer.commands.options import quiet_libraries
from trainer.config import build, plain
from trainer.data.batches import Images, Labels, Pairs
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.models.unet import UNetPolicy
from trainer.objectives import OBJECTIVES
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.runtime.processes import ALONE, joined
from trainer.training.config import TrainConfig, Watch
from trainer.training.evaluation import Evaluation
from trainer.training.parts import Parts, check_settings
from trainer.training.run import Run

_IMPORTED = (diffusers.utils.logging, transformers.utils.logging)  # by the command: before the fork it is done once

BUFFERED = {"steps": 6, "guidance_scale": 1.0, "buffer_gb": 1e-9 * 2 * 6 * 3 * 10, "estimator": "consistency", "collect_every": 3}
CASES = {
    **{name: {"name": name, **settings} for name, settings in SMALL.items()},
    "imagerefl with refl": {"name": "imagerefl", **SMALL["imagerefl"], "refl_share": 0.5, "kl_weight": 0.1},
    "refl, one step per batch": {"name": "refl", **SMALL["refl"], "per_sample": False},
    "direct-align offline": {"name": "direct-align", **SMALL["direct-align"], "source": "offline"},
    "sqdf with a buffer": {"name": "sqdf", **BUFFERED},
    "sqdf by priority": {"name": "sqdf", **BUFFERED, "replay": "prioritised"},
    "diffusion-dpo": {"name": "diffusion-dpo", "beta": 4.0, "sft_weight": 0.1, "prompt_dropout": 0.2},
    "diffusion-kto": {"name": "diffusion-kto", "beta": 4.0},
    "diffusion-dpo, a refreshed reference": {"name": "diffusion-dpo", "beta": 4.0, "reference_every": 3, "label_smoothing": 0.1},
    "diffusion-kto, an average as reference": {"name": "diffusion-kto", "beta": 4.0, "reference_every": 1, "reference_decay": 0.75},
    "mapo": {"name": "mapo", "margin_scale": 4.0, "levels": "early"},
    "ddpo": {
        "name": "ddpo",
        "steps": 4,
        "guidance_scale": 1.0,
        "group": 4,
        "prompts_per_round": 2,
        "kl_weight": 0.1,
        "clip": 0.2,
        "diversity_weighted": True,
    },
    "g2rpo": {  # groups as large as a process' share of a batch: where two share one, each draws its anchor, which are more calls
        **{"name": "g2rpo", "steps": 4, "group": 2, "prompts_per_round": 4, "branch_steps": 3, "clip": 0.2},
    },
    "awm": {"name": "awm", "steps": 4, "group": 4, "prompts_per_round": 2, "levels": 3},
    "diffusion-nft": {"name": "diffusion-nft", "steps": 4, "group": 4, "prompts_per_round": 2, "decay_rate": 0.2},
    "spo": {"name": "spo", "steps": 4, "guidance_scale": 1.0, "group": 3, "prompts_per_round": 4, "first_step": 1, "gap": 0.2},
    "pso": {"name": "pso", "steps": 3, "prompts_per_round": 4},
    "dro": {"name": "dro", "rollout_steps": 4},
    "chats": {"name": "chats", "beta": 4.0},
    "self-npo": {"name": "self-npo", "levels": 6, "rollout_steps": 2, "decay": 0.9},
    "sqdf-black-box": {"name": "sqdf-black-box", **BUFFERED, "queries": [5, 6], "updates_per_loop": 8, "epochs": 5, "heads": 2},
}


class Trained(Family):
    """The family's policy with what a run asks of one."""

    lora, lora_layout = Lora(rank=1), "native"
    name = "net.to_q.lora_A.default.weight"

    def named_parameters(self):
        return [(self.name, self.weight), (self.name.replace("_A.", "_B."), torch.nn.Parameter(torch.zeros(4), requires_grad=False))]

    def gradient_checkpointing(self, **_):
        pass


class TwoTrained(WithLoser, Trained):
    """With a loser beside it."""

    def named_parameters(self):
        halves = [("A", self.loser), ("B", torch.nn.Parameter(torch.zeros(4), requires_grad=False))]
        return [*super().named_parameters(), *((f"net.to_q.lora_{half}.tuned-loser.weight", value) for half, value in halves)]


class Features:
    def image_features(self, images):
        return images.flatten(1).float()

    def text_features(self, prompts):
        return torch.tensor([[len(p), 1.0, 0.5] for p in prompts])


class Asked(Towers):
    """The reward, counting the images it is asked about without gradient; `act` is called with each of its calls."""

    def __init__(self, act=lambda n: None):
        self.images, self.calls, self.act = 0, 0, act

    def __call__(self, images, prompts):
        self.calls += 1
        self.images += 0 if images.requires_grad else len(images)
        scores = super().__call__(images, prompts)
        bad = self.act(self.calls)
        return scores if bad is None else scores + bad


def samples(n=5, kind=Images):
    rng = torch.Generator().manual_seed(1)
    mean = 0.5 * torch.randn(n, 3, 1, 1, generator=rng, dtype=torch.float64)
    more = (
        {"rejected": torch.arange(n).roll(1)}
        if kind is Pairs
        else {"labels": torch.tensor([1.0, -1, 1, -1, 1])[:n]}
        if kind is Labels
        else {}
    )
    return Samples(tuple(["a", "bb", "ccc", "dddd", "eeeee"][:n]), LatentsInMemory(mean, 0.1 * torch.ones_like(mean)), **more)


def toy_run(case, out, processes=ALONE, reward=None, **settings):
    values = {
        "objective": CASES[case],
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps": 10,
        "save_every": 2,
        "max_grad_norm": 0.0,
        **settings,
    }
    config = build(TrainConfig, {"out": str(out), **values})
    parts = Parts(
        TwoTrained() if config.method.companions else Trained(),
        samples(kind=config.method.data),
        reward or Asked(),
        Features(),
        processes=processes,
    )
    check_settings(config, parts)
    run = Run(config, parts)
    run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=0.01)
    return run


def trained(case, out, processes=ALONE, resume=False, **settings):
    """Everything that two runs of one case must share: the first gradient, weights, logs, and what the oracle was asked."""
    run = toy_run(case, out, processes, **settings)
    run.open_folder(overwrite=False, resume=resume)
    gradients = []
    for _ in run.steps():
        gradients.append(torch.cat([p.grad for p in run.policy.parameters()]))
    asked = sum(processes.exchange(run.reward.images))
    return {"gradient": gradients[0], "weight": torch.cat([p.detach() for p in run.policy.parameters()]), "asked": asked}


def log_of(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory_gb")} for line in lines]


# -- processes -------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count, work, *arguments):
    """Start `work(folder, *arguments)` as processes do that a launcher started; the folder gets what each of them says."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, and forks before anything runs
    context.set_forkserver_preload(["helpers.processes"])
    environment = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [context.Process(target=_rank, args=(rank, environment, work, arguments)) for rank in range(count)]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # which the server that forks needs to import this file
        for process in started:
            process.start()
    return started


def finish(processes, timeout=60):
    """Exit statuses in order of rank."""
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise AssertionError("a process hangs")
    return [p.exitcode for p in processes]


def _rank(rank, environment, work, arguments):
    os.environ.update({key: str(value) for key, value in environment.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(Path(arguments[0]) / f"said.{rank}", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    code = work(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def said(folder, rank):
    """What a process said, but for warnings of libraries."""
    lines = (Path(folder) / f"said.{rank}").read_text().splitlines()
    return [line for line in lines if not line.startswith(("[W", "[rank"))]


def every_case(folder):
    """Train all cases one after the other in one group."""
    with joined() as processes:
        results = {case: trained(case, Path(folder) / case, processes) for case in CASES}
        torch.save(results, Path(folder) / f"results.{processes.rank}.pt")


SHARDED = {
    "refl": {"steps": 2, "grad_from": 1, "grad_to": 1, "per_sample": False, "kl_weight": 0.1},
    "imagerefl": {"steps": 2, "grad_from": 1, "grad_to": 1, "start_from": 0, "start_to": 0, "per_sample": False, "refl_share": 0.0},
    "draft-k": {"steps": 2, "k": 2, "guidance_scale": 2.0},
    "draft-lv": {"steps": 1, "guidance_scale": 1.0, "samples": 1, "recompute": False},
    "drtune": {"steps": 2, "k": 2, "early_stop": 2, "guidance_scale": 1.0},
    "flowbp-bridge": {"steps": 3, "k": 3, "guidance_scale": 2.0, "alpha": 0.5},
    "direct-align": {"steps": 1, "sigma_low": 0.5},
    "sqdf": {"steps": 2, "guidance_scale": 2.0, "buffer_gb": 0.0, "estimator": "consistency"},
}


def adapted(pipeline):
    """The random pipeline with a random LoRA and a random consistency adapter."""
    policy, rng = UNetPolicy.load(pipeline), torch.Generator().manual_seed(0)
    consistency = policy.adapters.attach("consistency", Lora(rank=2))
    policy.add_lora(Lora(rank=4))
    with torch.no_grad():
        for parameter in (*consistency.values(), *policy.parameters()):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return policy


def held(policy):
    """Bytes of the network's frozen weights in this process."""
    frozen = (p for name, p in policy.network.named_parameters() if ".lora_" not in name)
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)


def sharded_run(pipeline, out, processes, reward=None, **settings):
    """A watched run of a few steps on the random pipeline."""
    watch = Watch(every=2, heldout="the same", count=1, images=2, steps=1, guidance_scale=1.0)
    values = {"objective": {"name": "refl", **SHARDED["refl"]}, "batch_size": 2, "steps": 2, "save_every": 1, **settings}
    config = build(TrainConfig, {"out": str(out), "watch": plain(watch), "gradient_checkpointing_denoiser": True, **values})
    policy, reward = UNetPolicy.load(pipeline), reward or Asked()
    evaluation = Evaluation.of_run(config, policy, {"reward": reward, "heldout": Towers()}, ["a"], lambda x: x.flatten(1))
    parts = Parts(policy, Samples(("a", "bb", "ccc")), reward, evaluation=evaluation, processes=processes)
    check_settings(config, parts)
    run = Run(config, parts)
    run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=0.1)  # AdamW would make much of the signs of rounding errors
    return run


def every_sharded_case(folder, pipeline):
    """Gradients of every kind of objective by one process's samples, with whole weights and with half of them; then two runs."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with joined() as processes:
        whole, parts = adapted(pipeline), adapted(pipeline)
        parts.shard(processes.weights_mesh(parts.device))
        found = {"held": [held(whole), held(parts)]}
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(processes.rank))
        batch = batch_of(("a red star",), Rng(0, 1, (processes.rank,)), 3, latents)
        for number, (name, settings) in enumerate(SHARDED.items()):
            for policy in (whole, parts):
                policy.gradient_checkpointing(denoiser=number % 2 == 0, vae=False)
                for parameter in policy.parameters():
                    parameter.grad = None
                loss_of(OBJECTIVES[name](**settings), policy, batch, Towers(), folder=Path(folder))[0].backward()
                found.setdefault(name, []).append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        for name in ("whole", "parts"):
            processes.sharded = name == "parts"
            run = sharded_run(pipeline, Path(folder) / name, processes)
            run.open_folder(overwrite=False, resume=False)
            list(run.steps())
        torch.save(found, Path(folder) / f"results.{processes.rank}.pt")


def toy_command(folder, out, case, trouble, rank, at, resume=False, pipeline=None):
    """The train command with a toy run, in which process `rank` gets into trouble with its call `at` of the reward.

    With a pipeline it is a run on that, whose weights the processes share.
    """
    if pipeline is not None:
        os.environ["ACCELERATE_USE_FSDP"] = "true"

    quiet_libraries()

    def train(_, processes):
        def act(call):
            if (processes.rank, call) == (rank, at):
                return TROUBLE[trouble]()

        run = toy_run(case, out, processes, Asked(act)) if pipeline is None else sharded_run(pipeline, out, processes, Asked(act))
        run.open_folder(overwrite=False, resume=resume)
        for _ in run.steps():
            pass
        return 0

    commands._train = train
    commands.joined = partial(joined, timeout=timedelta(seconds=8 if trouble == "hang" else 60))
    return main(["train"])


def _full():
    raise OSError("No space left on device")


TROUBLE = {
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(600),
    "disk": _full,
}
