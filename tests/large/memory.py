"""The plan of a training step against what the step takes on a CPU: by counting live tensors, and by resident memory.

Usage: memory.py [demo] [sd15 …] [--size 256] [--reduced] [--out FILE.md]. With --reduced the network has its published widths and
verify.py's number of blocks, and prompts have 16 tokens. Each case is a process of its own: the objective's most
expensive micro-batch after a first optimizer step, random weights for the published configurations, CLIP ViT-B/32's
architecture as the reward (the embedded model has its own). Resident memory is the peak of the step over what the process
held before it; glibc is told to give memory back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from tools.embedded.benchmark import _memory as status
from trainer.config import build
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.memory import plan as planning
from trainer.memory.dry_run import MemoryTracker, dry_run
from trainer.memory.offload import tensors
from trainer.models.load import MODELS
from trainer.models.open import open_policy
from trainer.rewards.clip import ARCHITECTURES, tokenizer
from trainer.rewards.preprocess import Fit
from trainer.rewards.registry import load_reward
from trainer.rewards.two_tower import TwoTower
from trainer.training.config import TrainConfig
from trainer.training.parts import Parts
from trainer.training.run import Run

sys.path.insert(0, str(Path(__file__).parent))

OBJECTIVES = {
    "ReFL": {"name": "refl", "grad_from": 3, "grad_to": 3},
    "ImageReFL": {"name": "imagerefl", "grad_from": 3, "grad_to": 3, "start_from": 2, "start_to": 2, "refl_share": 0.0},
    "DRaFT-1": {"name": "draft-k", "k": 1},
    "DRaFT-2": {"name": "draft-k", "k": 2},
    "DRaFT-2, nothing recomputed": {"name": "draft-k", "k": 2, "recompute": False},
    "DRaFT-LV": {"name": "draft-lv"},
    "DRTune": {"name": "drtune", "k": 2, "early_stop": 2},
    "FlowBP-Sparse": {"name": "flowbp-sparse", "k": 2},
    "FlowBP-Bridge": {"name": "flowbp-bridge", "k": 3},
    "FlowBP-Lagrange": {"name": "flowbp-lagrange"},
    "LeapAlign": {"name": "leapalign"},
    "LeapAlign, nothing recomputed": {"name": "leapalign", "recompute": False},
    "AlignProp": {"name": "alignprop", "cut_mean": 2.0, "cut_std": 0.0},
    "Direct-Align": {"name": "direct-align"},
    "SRPO": {"name": "srpo"},
    "SQDF": {"name": "sqdf"},
    "SQDF, black box": {"name": "sqdf-black-box"},
}
STEPS = 4  # of the sampler


def clip_reward():
    """CLIP ViT-B/32 with random weights."""
    import open_clip

    architecture = ARCHITECTURES["ViT-B-32"]
    return TwoTower(open_clip.CustomTextCLIP(**architecture), tokenizer(), Fit(224))


def one(case):
    """Planned, counted and resident bytes of one case's step, without weights."""
    model, name, checkpoints, size = case["model"], case["objective"], case["checkpoints"], case["size"]
    with tempfile.TemporaryDirectory() as folder:
        config = build(
            TrainConfig,
            {
                "out": folder,
                "model": model,
                "batch_size": case["batch"],
                "images": "demo",
                "objective": {**OBJECTIVES[name], "steps": STEPS},
                "image_size": size if model != "demo" else 0,
                "model_options": {"dtype": case["dtype"]},
                **{f"gradient_checkpointing_{part}": checkpoints for part in ("denoiser", "vae", "reward")},
            },
        )

        def features(tower):
            return tower if "black box" in name else None

        import verify

        verify.SIZE, verify.MODELS = size, {model: verify.MODELS[model] if case["reduced"] else {}}
        if case["reduced"]:
            family, published = MODELS[model]
            library, network = published.parts[family.network_name]
            parts = {**published.parts, family.network_name: (library, {**network, **verify.MODELS[model]})}
            MODELS[model] = family, replace(published, parts=parts)
        tracker = MemoryTracker()
        with dry_run(tracker):
            outline = open_policy(model, "meta", config.model_options, config.image_size)
            reward = load_reward("demo-proxy" if model == "demo" else "clip", False, "meta")
        if case["reduced"]:
            outline.max_tokens = 16
        begin = time.monotonic()
        planned = planning.plan(config, planning.MetaModels(outline, reward, features(reward)), tracker)
        seconds = time.monotonic() - begin
        weights = sum(size for name, size in planned.components.items() if name.endswith(" weights"))

        if model == "demo":
            policy, reward = open_policy("demo"), load_reward("demo-proxy", False)
        else:
            policy, reward = verify.build(model, Path(folder), size=size), clip_reward()
        if case["reduced"]:
            policy.max_tokens = 16
        config = planning.without_side_effects(config, Path(folder) / "run")
        latent = torch.randn(1, *policy.latent_shape)
        prompts = tuple(f"prompt {i} of more than sixteen letters" for i in range(max(2, config.batch_size)))
        samples = Samples(prompts, LatentsInMemory(*(value.expand(len(prompts), -1, -1, -1) for value in (latent, latent.abs()))))
        run = Run(config, Parts(policy, samples, reward, features(reward)))
        reward.gradient_checkpointing(checkpoints)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad()
        state = [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        before = sum(t.nbytes for t in [*policy.parameters(), *state])

        def step():
            loss, _ = run.loss(run.batches(planned.micro_batch, 0))
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        resident = status("VmRSS:")
        step()
        resident = (status("VmHWM:") - resident) * 2**20
        policy.prompts.clear()
        counter = MemoryTracker(torch.device("cpu"))
        counter.attribute(tensors(policy.network, policy.vae, policy.pipeline.text_encoder, reward), "weights")
        counter.attribute([*policy.parameters(), *state], "state")
        real = counter.live["weights"]  # without the adapter, which `attribute` has just moved; its text encoder has one layer
        with counter:
            step()
        return {
            **case,
            "planned": (planned.counted - weights) / 1e9,
            "counted": (counter.peak.bytes - real) / 1e9,
            "resident": (resident + before) / 1e9,
            "moment": planned.moment,
            "seconds": round(seconds, 1),
        }


def measured(case, **environment):
    """What `one` returns in a process of its own; None where it failed."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure every case, write a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--only", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES), help="objectives")
    parser.add_argument("--size", type=int, default=256, help="pixels, for published configurations")
    parser.add_argument("--reduced", action="store_true", help="published widths, verify.py's number of blocks")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.case:
        print(json.dumps(one(arguments.case)))
        return
    lines = [
        "| model | objective | checkpoints | planned, GB | counted, GB | resident, GB | planned/counted | planned/resident |",
        "|" + "---|" * 8,
    ]
    print("\n".join(lines), flush=True)
    for model in arguments.models:
        for name in arguments.only:
            for checkpoints in (False, True):  # all three
                batch, dtype = (8, "float32") if model == "demo" else (1, "bfloat16")
                case = {
                    "model": model,
                    "objective": name,
                    "checkpoints": checkpoints,
                    "size": arguments.size,
                    "reduced": arguments.reduced,
                    "batch": batch,
                    "dtype": dtype,
                }
                r = measured(case, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
                if r is None:
                    continue
                gigabytes = " | ".join(f"{r[key]:.3f}" for key in ("planned", "counted", "resident"))
                ratios = " | ".join(f"{r['planned'] / r[key]:.3f}" for key in ("counted", "resident"))
                lines.append(f"| {model} | {name} | {'on' if checkpoints else 'off'} | {gigabytes} | {ratios} |")
                print(lines[-1], r["moment"], r["seconds"], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
