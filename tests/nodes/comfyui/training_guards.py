"""Run inside a ComfyUI: what a graph must not train, and the host's state while it trains.

Usage: training_guards.py COMFYUI PACK. Prints one JSON line.
"""

import json

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management as management
import comfy.model_patcher
import torch

demo, graph, switch, autograd = (embedded.ours(f"nodes.{name}") for name in ("demo", "policy", "switch", "autograd"))
lora = embedded.ours("trainer.policy").Lora(rank=2, alpha=2.0, targets=("to_q",))
results = {}


class Dynamic(comfy.model_patcher.ModelPatcher):
    """A patcher that says that its weights are in dynamic VRAM, which a CPU never has."""

    copies, anew = True, None

    def is_dynamic(self):
        return type(self) is Dynamic

    def clone(self, disable_dynamic=False):
        assert disable_dynamic
        if not self.copies:
            raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init is not initialized.")
        return self.anew()


def dynamic(patcher, anew):
    made = Dynamic(patcher.model, patcher.load_device, patcher.offload_device)
    made.anew = anew
    return made


def refused(action):
    try:
        action()
        return ""
    except ValueError as problem:
        return str(problem)


def policy_of(model, vae, gradient_vae=None):
    return graph.ComfyPolicy(model, vae, lambda p: clip.encode_from_tokens_scheduled(clip.tokenize(p)), (4, 8, 8), gradient_vae)


with torch.inference_mode():
    model, clip, vae, small = demo.load_model(), demo.load_clip(), demo.load_vae(), demo.load_vae()
    tuned, _ = embedded.with_lora(model, embedded.ours("trainer.lora.file").read_lora(next(iter(demo.files.loras().values())))[0])
with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
    results["a switch"] = refused(lambda: policy_of(switch.switched(model, tuned, switch.Rule("step", 1)), vae))

    plain = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))
    marked = {"control": object(), "area": (8, 8, 0, 0), "end_percent": 0.5, "start_percent": 0.0}
    for name, parts in (("plain", plain), *((key, [[plain[0][0], {**plain[0][1], key: value}]]) for key, value in marked.items())):
        read = graph.ComfyPolicy(model, vae, lambda p, parts=parts: parts, (4, 8, 8)).prompts
        results[f"conditioning: {name}"] = refused(lambda read=read: read.prepare("a red star"))
    guided = model.clone()
    guided.set_model_sampler_cfg_function(lambda args: args["cond"])
    results["patches"] = [embedded.ours("nodes.graph_run").unheeded(one) for one in (model, guided)]

    policy = policy_of(model, vae)
    policy.add_lora(lora, 0)
    if not hasattr(management, "in_training"):
        management.in_training = False  # as newer versions have it
    seen = [management.in_training]
    with policy.loaded([], 1):
        seen.append(management.in_training)
    seen.append(management.in_training)
    for failure in (ValueError(), management.InterruptProcessingException()):
        try:
            with policy.loaded([], 1):
                raise failure
        except (ValueError, management.InterruptProcessingException):
            seen.append(management.in_training)
    management.in_training = True
    with policy.loaded([], 1):
        pass
    results["in_training"] = [*seen, management.in_training]
    management.in_training = False

    policy.gradient_checkpointing(denoiser=True, vae=True)
    network, policy.model.model.diffusion_model = policy.model.model.diffusion_model, torch.nn.Sequential()
    policy.model.model.diffusion_model.dtype = torch.float32
    policy._modules, modules = {}, policy._modules
    results["no block"] = refused(lambda: policy.loaded([], 1).__enter__())
    policy.model.model.diffusion_model, policy._modules = network, modules

    results["shared where it is not dynamic"] = policy.model.model is model.model and policy.vae is vae

    def as_filed():
        loaded = demo.load_vae().patcher
        loaded.model.half()  # ComfyUI's loader leaves the type of the file, and casts at each use
        return loaded

    for one in (vae, small):
        one.patcher = dynamic(one.patcher, as_filed)
    copied = policy_of(dynamic(model, demo.load_model), vae, small)
    patchers = [copied.model, copied.vae.patcher, copied.gradient_vae.patcher]
    results["dynamic after"] = [getattr(p, "is_dynamic", bool)() for p in patchers]
    results["own weights"] = [p.model is not old.model for p, old in zip(patchers, (model, vae.patcher, small.patcher))]
    assert copied.vae.first_stage_model is copied.vae.patcher.model and vae.first_stage_model is vae.patcher.model
    results["types of the VAEs"] = sorted({str(p.dtype) for p in [*patchers[1].model.parameters(), *patchers[2].model.parameters()]})
    Dynamic.copies = False
    results["no copy"] = refused(lambda: policy_of(dynamic(model, demo.load_model), vae))
    apart = comfy.model_patcher.ModelPatcher(model.model, torch.device("meta"), torch.device("cpu"))
    results["partly loaded"] = refused(lambda: autograd.require_whole(apart))

# a GPU, to which weights are moved in place, by what does the same on a CPU
with torch.inference_mode():
    model, clip, vae = demo.load_model(), demo.load_clip(), demo.load_vae()
    plain = embedded.plain_sample(model, clip)
    rewards, scoring = (embedded.ours(f"nodes.{name}") for name in ("rewards", "scoring"))
    rewards.register_folder()
    reward, load = rewards.load("demo-proxy"), management.load_models_gpu
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = scoring.score(reward, images, ["a red star"] * 2)[0]

    def moving(models, *args, **kwargs):
        load(models, *args, **kwargs)
        for one in models:
            one.model.to(torch.float64).to(torch.float32)

    management.load_models_gpu = moving
    with autograd.outside_inference(), torch.enable_grad():
        policy = policy_of(model, vae)
        policy.add_lora(lora, 0)
        policy.prompts.prepare("a red star")
        with policy.loaded(reward.patchers, 1):
            decoded = policy.decode(policy.denoiser(["a red star"])(torch.randn(1, 4, 8, 8), torch.ones(1)))
            reward(decoded, ["a red star"]).sum().backward()
            results["gradient"] = float(sum(p.grad.abs().sum() for p in policy.parameters()))
        stands = management.load_models_gpu is not moving
    results["moved as elsewhere"] = stands and management.load_models_gpu is moving
    results["off after training"] = float((embedded.plain_sample(model, clip) - plain).abs().max())
    results["scores off"] = float((scoring.score(reward, images, ["a red star"] * 2)[0] - scores).abs().max())
    management.load_models_gpu = lambda *args, **kwargs: None  # as --novram: nothing is brought there
    before = [id(p) for p in model.model.parameters()]
    with autograd.outside_inference():
        policy = policy_of(model, vae)
        policy.add_lora(lora, 0)
        policy.model.load_device = torch.device("meta")
        results["not whole"] = refused(lambda: policy.loaded([], 1).__enter__())
    results["weights left alone"] = before == [id(p) for p in model.model.parameters()]
    reward.patchers[0].load_device = torch.device("meta")
    reward.to_device()
    results["where the reward is"] = sorted({p.device.type for p in reward.reward.parameters()})
    management.load_models_gpu = load
print(json.dumps(results))
