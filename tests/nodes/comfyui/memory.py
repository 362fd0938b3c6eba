"""Run inside a ComfyUI: what a training in a graph is planned to take, what it takes, and the settings that a memory mode chooses.

Usage: memory.py COMFYUI PACK. Prints one JSON line.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management as management
import comfy.model_patcher
import folder_paths
import tiny
import torch

ours = embedded.ours
demo, graph, graph_run, memory, rewards, run_folders = (
    ours(f"nodes.{name}") for name in ("demo", "policy", "graph_run", "memory", "rewards", "run_folders")
)
objectives, planning = ours("trainer.objectives"), ours("trainer.memory.plan")
lora = ours("trainer.policy").Lora(rank=4, alpha=4.0, targets=("to_q", "to_out.0"))
draft = ("draft-k", objectives.DRaFTK(steps=3, k=2, guidance_scale=1.0))
results, folder = {}, Path("output").resolve()
folder_paths.set_output_directory(str(folder))
rewards.register_folder()


def family(name):
    """A random MODEL, what conditions it, and a VAE of its latents, taken for 64×64 pixels."""
    kind, described = tiny.described(name, None)
    config = kind(described)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    model.diffusion_model.load_state_dict(tiny._random(model.diffusion_model, 1))
    device = management.get_torch_device()
    rng = torch.Generator().manual_seed(0)
    text, pooled = torch.randn(1, 77, 64, generator=rng), torch.randn(1, 32, generator=rng)
    taesd = tiny._random(comfy.taesd.taesd.TAESD(latent_channels=16), 2) | {"vae_scale": torch.ones(1)}
    small = comfy.sd.VAE(sd=taesd) if name == "flux" else demo.load_vae()
    return comfy.model_patcher.ModelPatcher(model, device, device), lambda prompt: [[text, {"pooled_output": pooled}]], small


def policy_of(name):
    """A policy, with an adapter and its prompts encoded."""
    with torch.inference_mode():
        if name == "demo":
            clip = demo.load_clip()
            model, vae, condition = demo.load_model(), demo.load_vae(), lambda p: clip.encode_from_tokens_scheduled(clip.tokenize(p))
        else:
            model, condition, vae = family(name)
    policy = graph.ComfyPolicy(model, vae, condition, (16 if name == "flux" else 4, 8, 8))
    policy.add_lora(ours("trainer.policy").Lora(rank=4, alpha=4.0, targets=("to_q", "to_out.0", "attn.to_out.0")), 0)
    for prompt in ("a red star", "a blue ring", ""):
        policy.prompts.prepare(prompt)
    return policy


def config_of(**settings):
    table = {"steps": 1, "batch_size": 4, **settings}
    return graph_run._config(folder, draft, rewards.load("demo-proxy"), lora, {**table, "device": "cpu"})


def peaks(policy, config):
    """Bytes at the peak of a step: planned, and counted in a real one."""
    reward = rewards.in_dtype(rewards.load("demo-proxy"), getattr(torch, config.reward_dtype))
    planned = memory.GraphPlanner(policy, (reward, None, None), 3, ours("trainer.training.config").Watch())(config)
    policy.gradient_checkpointing(denoiser=config.gradient_checkpointing_denoiser, vae=True)
    policy.slicing = config.vae_slicing
    samples = ours("trainer.data.samples").Samples(("a red star", "a blue ring"))
    tracker = ours("trainer.memory.dry_run").MemoryTracker(torch.device("cpu"))
    with policy.loaded(reward.patchers, config.batch_size), memory.recomputing(reward, config.gradient_checkpointing_reward):
        run = ours("trainer.training.run").Run(
            planning.without_side_effects(config, folder), ours("trainer.training.parts").Parts(policy, samples, reward)
        )
        tracker.attribute(planning.tensors(policy.model.model.diffusion_model, policy.vae.first_stage_model, reward.reward), "weights")
        tracker.attribute(policy.parameters(), "adapter")
        run.context.reward(torch.rand(1, 3, 64, 64), ["a red star"]), run.context.reward(torch.rand(1, 3, 64, 64), ["a blue ring"])
        with tracker:
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.loss(run.batches(0, 0))[0].backward()
    return planned.phases["training step"], tracker.peak.bytes


def trained(mode, resume=run_folders.NEW, **settings):
    """The report, the run's settings as written, and its LoRA; or what was refused."""
    clip, load = demo.load_clip(), rewards.load
    given = {"memory": mode} if mode else {}
    try:
        output = graph_run.train_in_graph(
            model=demo.load_model(), vae=demo.load_vae(), clip=clip, reward=load("demo-proxy"), heldout=load("demo-heldout"),
            prompts="a red star", objective=draft, lora=lora, name="a run", resume=resume, preview_every=1, preview_cfg=1.0,
            width=64, height=64, image_size=64, settings={"steps": 2, "batch_size": 4, "save_every": 1, **settings}, **given,
        )  # fmt: skip
    except ValueError as problem:
        return str(problem), {}, {}
    newest = max(folder.glob("imagerefl/*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    return output.result[5], json.loads(newest.read_text("utf-8")), output.result[1]


def brief(name, run):
    results[name] = [run[0], {k: v for k, v in run[1].items() if k in (*KEYS, "batch_size", "gradient_accumulation_steps")}]


def difference(run, other):
    """Of two LoRAs, relative to what was learned; the upward halves start at 0."""
    up = [name for name in run if "lora_up" in name]
    ours_, theirs = (torch.cat([one[name].flatten() for name in up]) for one in (run, other))
    return float((ours_ - theirs).norm() / theirs.norm())


KEYS = [setting.key for setting in ours("trainer.memory.savings").SETTINGS]
with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
    latents = ours("nodes.latents")
    for name in ("demo", "sdxl", "flux"):
        policy = policy_of(name)
        results[f"unit, {name}"] = latents.pixels_per_latent(policy.vae) * latents.latents_per_token(policy.model)
        results[f"as given, {name}"] = peaks(policy, config_of())
        results[f"small, {name}"] = peaks(policy, memory.smallest(config_of(), {"model_options.dtype"}))

    results["unit, sd3"] = 8 * latents.latents_per_token(tiny.sd3(1))
    prompts = policy_of("sdxl").prompts
    size = lambda height, width: prompts.grouped(["a red star"], torch.zeros(1, 4, height, width))[0][1]["y"]  # noqa: E731
    wide, again = size(8, 16), size(8, 16)
    results["SDXL's size conditioning"] = [float((wide - size(8, 8)).abs().max()), float((wide - again).abs().max())]
    for number in range(100):
        prompts.grouped([f"a red star {number}"], torch.zeros(1, 4, 8, 8))
    results["prompts on the device"] = len(prompts.conds)

    policy, sizes = policy_of("demo"), []
    decode = policy.vae.first_stage_model.decode
    policy.vae.first_stage_model.decode = lambda latents: (sizes.append(len(latents)), torch.zeros(len(latents), 3, 8, 8))[1]
    with torch.no_grad():
        for side in (128, 64, 8):
            policy.decode(torch.zeros(8, 4, side, side))
    results["decoded at a time"] = sizes

    policy, reward = policy_of("demo"), rewards.load("demo-proxy")
    planner = lambda images: memory.GraphPlanner(policy, (reward, None, None), 3, ours("trainer.training.config").Watch(), images)  # noqa: E731
    steps = [planner(images)(config_of(images="graph: 1")).phases["training step"] for images in (0, 1000)]
    results["latents of 1000 images"] = steps[1] - steps[0]
    policy.vae.downscale_ratio = 16
    results["pixels at 16 per latent"] = list(planner(0).policy.image_size)

with torch.inference_mode():
    fast, absent = trained("fast"), trained(None)
    brief("fast", fast), brief("absent", absent)
    results["fast is as without"] = difference(fast[2], absent[2])
    brief("fits as given", trained("balanced"))
    planned, calls = memory.GraphPlanner.__call__, []

    def remembered(self, config):
        calls.append(planned(self, config))
        return calls[-1]

    memory.GraphPlanner.__call__ = remembered
    small = trained("small")
    brief("small", small)
    least = calls[-1].total
    trained("balanced")
    most = calls[-1].total
    results["least and most"] = [least, most]
    memory.available = lambda device: (3 * most + least) // 4
    some = trained("balanced")
    brief("some", some)
    results["some is as fast"] = difference(some[2], fast[2])
    memory.available = lambda device: 1
    brief("nothing fits", trained("balanced"))
    brief("small does not fit", trained("small"))
    kept = {"resume": run_folders.LAST, "steps": 3}
    brief("resumed, does not fit", trained("balanced", **kept))
    memory.available = lambda device: (3 * most + least) // 4
    brief("resumed", trained("balanced", **kept))
    memory.available = lambda device: 2 * most
    brief("resumed, small", trained("small", resume=run_folders.LAST, steps=4))
    memory.GraphPlanner.__call__ = lambda self, config: 1 / 0
    brief("balanced, not planned", trained("balanced"))
    brief("small, not planned", trained("small"))


class Spy(ours("trainer.rewards.base").RewardModel):
    """Notes where it is moved."""

    def __init__(self, name, moves):
        super().__init__()
        self.name, self.moves, self.weight = name, moves, torch.nn.Parameter(torch.zeros(1))

    def place(self, device, prompts=None):
        self.moves.append((self.name, str(device), len(prompts)))

    def to(self, device):
        self.moves.append((self.name, str(device)))


moves = []
trained_on, heldout = (rewards.Loaded(n, Spy(n, moves), patchers=(object(),)) for n in ("trained", "held-out"))
config = SimpleNamespace(offload_encoders=True, device="cuda:0", method=draft[1])
with memory.offloaded(config, (trained_on, None), heldout, ["a", "b"], ["a", "c"]) as judging, judging():
    moves.append("judged")
results["moves"] = moves
print(json.dumps(results))
