"""Run inside a ComfyUI: Reward Search on the embedded model, against stock sampling and itself.

Usage: search.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import json

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management
import comfy.samplers
import comfy.utils
import nodes as stock
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_model_advanced

extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in asyncio.run(extension.get_node_list())}
particles, searching = embedded.ours("nodes.particles"), embedded.ours("nodes.search")
results = {"refused": {}}
TEXT = "a large red star on a black background, crisp, vivid"


def call(node, *arguments, **keywords):
    return N[node].execute(*arguments, **keywords).result


def stock_call(node, *arguments, **keywords):
    """A stock node, whose interface differs between versions."""
    if hasattr(node, "execute") and hasattr(node, "define_schema"):
        return node.execute(*arguments, **keywords).result
    made = node()
    return getattr(made, made.FUNCTION)(*arguments, **keywords)


with torch.inference_mode():
    model, clip, vae = call("DemoModel")
    positive, negative = (stock.CLIPTextEncode().encode(clip, text)[0] for text in (TEXT, ""))
    guider = stock_call(custom.CFGGuider, model, positive, negative, 2.0)[0]
    noise = stock_call(custom.RandomNoise, 7)[0]
    sigmas = stock_call(custom.BasicScheduler, model, "normal", 8, 1.0)[0]
    proxy, heldout = (call("LoadReward", f"demo-{name}")[0] for name in ("proxy", "heldout"))
    empty = {"samples": torch.zeros(1, 4, 8, 8)}

    def sampler(name):
        return comfy.samplers.sampler_object(name)

    defaults = {
        "noise": noise, "guider": guider, "sampler": sampler("euler_ancestral"), "sigmas": sigmas, "latent_image": empty, "reward": proxy,
        "vae": vae, "prompt": TEXT, "method": "code", "budget": 0, "images": 1, "particles": 1, "children": 4, "block": 0, "chunk": 16,
        "diversity": 0.0, "start": 0.0, "end": 1.0, "strength": 10.0, "ess": 0.5, "temperature": 0.0, "potential": "max", "lookahead": 1,
        "oversample": 5,
    }  # fmt: skip

    def search(**more):
        return call("Search", **{**defaults, **more})

    def rewards(latents):
        return [float(x) for x in searching.rewards(proxy, vae, latents, TEXT, 16)]

    # best-of-n is the stock sampler's batch, sorted, with any sampler
    results["best of n"] = {}
    for name in ("euler_ancestral", "dpmpp_2m", "euler", "dpmpp_2m_sde", "uni_pc", "heun"):
        batch = {"samples": torch.zeros(5, 4, 8, 8)}
        drawn = stock_call(custom.SamplerCustomAdvanced, noise, guider, sampler(name), sigmas.clone(), batch)[0]["samples"]
        order = torch.tensor(rewards(drawn)).argsort(descending=True, stable=True)
        best = search(method="best-of-n", particles=5, images=3, sampler=sampler(name))[0]["samples"]
        results["best of n"][name] = float((best - drawn[order[:3]]).abs().max())

    # the embedded steps of code and others: the identities
    one = search(method="code", block=8, children=5)[0]["samples"]
    results["code in one block"] = float((one - search(method="best-of-n", particles=5)[0]["samples"]).abs().max())
    results["the same again"] = float((search()[0]["samples"] - search(chunk=16)[0]["samples"]).abs().max())
    results["in chunks"] = float((search(chunk=3)[0]["samples"] - search()[0]["samples"]).abs().max())

    # what each method finds and spends, by the node's own table
    found = {}
    for method in ("best-of-n", "svdd", "code", "fk", "dlbs", "dsearch"):
        latent, table, tree, csv = search(method=method, budget=160, images=1, particles=2 if method == "dlbs" else 1, heldout=heldout)
        found[method] = [
            rewards(latent["samples"])[0],
            table.splitlines()[2:],
            list(tree.shape),
            csv.splitlines()[0],
            len(csv.splitlines()),
        ]
    results["methods"] = found
    batch = {"samples": torch.zeros(16, 4, 8, 8)}
    drawn = stock_call(custom.SamplerCustomAdvanced, noise, guider, sampler("euler_ancestral"), sigmas, batch)[0]["samples"]
    results["plain"] = sum(rewards(drawn)) / 16

    # other stochastic samplers branch
    results["samplers"] = {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        one = sampler(name)
        can = particles.branches(one, model, sigmas) if "cfg_pp" not in name else None
        results["samplers"][name] = [can, particles.calls_per_step(one)]
    results["svdd"] = {}
    for name in ("ddpm", "lcm", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_ancestral", "er_sde", "seeds_2"):
        latent, table, _, _ = search(method="svdd", sampler=sampler(name), children=3)
        results["svdd"][name] = [rewards(latent["samples"])[0], table.splitlines()[-1]]

    # density guidance moves what the sampler steps with, not what is scored: each against the guider's own predictions
    dense = stock_call(custom.CFGGuider, call("DensityGuidance", model, 0.1)[0], positive, negative, 2.0)[0]
    own, seen, predict, score = [], [], dense.predict_noise, searching.rewards
    dense.predict_noise = lambda *given, **more: own.append(predict(*given, **more)) or own[-1]
    searching.rewards = lambda reward, vae, latents, *rest: seen.append(latents) or score(reward, vae, latents, *rest)
    last = search(guider=dense, method="svdd", children=2)[0]["samples"]
    searching.rewards = score
    plain = [model.model.process_latent_out(x) for x in own]
    results["density"] = [min(float((x - y).abs().max()) for y in plain if x.shape == y.shape) for x in seen]
    results["density, image"] = min(float((last - x).abs().max()) for x in seen[-1].split(1))

    # seed variance: from one start noise for all, each image of a batch has its own embedding in the first of four steps
    class Same:
        seed = 7

        def generate_noise(self, latent):
            return noise.generate_noise({"samples": latent["samples"][:1]}).expand_as(latent["samples"]).clone()

    def drawn_with(prompt, n):
        made, few_steps = stock_call(custom.CFGGuider, model, prompt, negative, 2.0)[0], sigmas[[0, 2, 4, 6, 8]]
        return stock_call(custom.SamplerCustomAdvanced, Same(), made, sampler("euler"), few_steps, {"samples": torch.zeros(n, 4, 8, 8)})[0][
            "samples"
        ]

    vary = {"seed": 3, "strength": 0.5, "share": 0.5, "end": 0.2}
    varied = call("SeedVariance", conditioning=positive, images=3, **vary)[0]
    three, alike = drawn_with(varied, 3), drawn_with(positive, 3)
    two = drawn_with(call("SeedVariance", conditioning=positive, images=2, **vary)[0], 2)
    moved = varied[0][0] - positive[0][0]
    spread = lambda x: float((x[1:] - x[:1]).abs().mean())  # noqa: E731
    early = drawn_with([[moved + positive[0][0], positive[0][1]]], 3)
    results["seed variance"] = {
        "alike": spread(alike), "varied": spread(three), "to the end": spread(early), "of a batch": float((three[:2] - two).abs().max()),
        "share": float((moved != 0).float().mean()), "std": float(moved[moved != 0].std() / positive[0][0].std()),
        "off": call("SeedVariance", conditioning=positive, images=1, **{**vary, "strength": 0.0})[0] is positive,
        "refused": embedded.refused(lambda: call("SeedVariance", conditioning=varied, images=1, **vary)),
    }  # fmt: skip

    # from an image, with a mask
    image = stock_call(custom.SamplerCustomAdvanced, noise, guider, sampler("euler_ancestral"), sigmas, empty)[0]["samples"]
    late = stock_call(custom.BasicScheduler, model, "normal", 8, 0.3)[0]
    near = search(latent_image={"samples": image}, sigmas=late)[0]["samples"]
    far = search(latent_image={"samples": image})[0]["samples"]
    results["from an image"] = [float((x - image).abs().mean()) for x in (near, far)]
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    kept = search(latent_image={"samples": image, "noise_mask": mask}, sigmas=late, method="svdd")[0]["samples"]
    results["masked"] = [float((kept - image)[..., 4:, :].abs().max()), float((kept - image)[..., :4, :].abs().max())]

    # progress, previews, Cancel within a step
    hook = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: hook.append((value, total, preview is not None)))
    search(method="svdd", chunk=2)
    results["progress"] = [hook[-1][0], sorted({total for _, total, _ in hook}), len(hook)]
    calls = []
    real = comfy.model_management.throw_exception_if_processing_interrupted

    def cancel(*_, **__):
        calls.append(1)
        if len(calls) == 5:
            raise comfy.model_management.InterruptProcessingException()

    comfy.model_management.throw_exception_if_processing_interrupted = cancel
    try:
        search(method="svdd", chunk=1)
        results["cancelled"] = False
    except comfy.model_management.InterruptProcessingException:
        results["cancelled"] = len(calls)
    comfy.model_management.throw_exception_if_processing_interrupted = real
    comfy.utils.set_progress_bar_global_hook(None)
    results["after a cancelled run"] = float((search()[0]["samples"] - search()[0]["samples"]).abs().max())

    # bad input
    def refused(name, **more):
        results["refused"][name] = embedded.refused(lambda: search(**more))

    refused("deterministic", method="svdd", sampler=sampler("euler"))
    refused("no noise", method="fk", particles=4, sampler=comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0}))
    refused("cfg++", method="best-of-n", sampler=sampler("euler_cfg_pp"))
    refused("not to zero", sigmas=sigmas[:4])
    refused("no prompt", prompt=" ")
    refused("no prompt for a sum", prompt="", reward=embedded.ours("nodes.rewards").Combined(((proxy, 1.0), (heldout, 1.0))))
    refused("two latents", latent_image={"samples": torch.zeros(2, 4, 8, 8)})
    refused("budget", budget=10)
    refused("one noise", method="best-of-n", particles=3, noise=stock_call(custom.DisableNoise)[0])
    refused("ess", method="fk", particles=4, ess=2.0)
    refused("block", block=9)

    # Optimise Noise: its first image is a stock sampler's from the same noise, and it finds more reward
    few = stock_call(custom.BasicScheduler, model, "normal", 3, 1.0)[0]
    start = embedded.ours("trainer.rng").Rng(5, 0, (0,)).start_noise((4, 8, 8))
    settings = {
        "iterations": 50, "starts": 1, "learning_rate": 5.0, "clip": 0.1, "norm_weight": 0.01, "neighbours": 4, "rotation": 0.3,
        "rotation_end": 0.1,
    }  # fmt: skip

    def optimise(**more):
        given = {"latent_image": empty, "sigmas": few, "vae": vae, "reward": proxy, "prompt": TEXT, "seed": 5, "cfg": 2.0, "method": "reno"}
        given |= {"model": model, "positive": positive, "negative": negative, "sampler": "ddim"}
        return call("OptimiseNoise", **{**given, **settings, **more})

    class Given:
        seed = 5

        def generate_noise(self, latent):
            return start

    drawn = stock_call(custom.SamplerCustomAdvanced, Given(), guider, sampler("euler"), few, empty)[0]["samples"]
    only = optimise(iterations=1)[0]["samples"]
    hook.clear()
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: hook.append((value, total, preview is not None)))
    results["noise"] = {"first": float((only - drawn).abs().max()), "plain": rewards(drawn)[0]}
    for method in ("reno", "carinox", "rotate"):
        latent, table, plot = optimise(method=method, iterations=6, starts=1 + (method == "carinox"), heldout=heldout)
        results["noise"][method] = [rewards(latent["samples"])[0], table.splitlines(), list(plot.shape)]
    results["noise"]["progress"] = [hook[5][:2], sum(preview for _, _, preview in hook) > 3]
    calls.clear()
    comfy.model_management.throw_exception_if_processing_interrupted = cancel
    try:
        optimise()
        results["noise"]["cancelled"] = False
    except comfy.model_management.InterruptProcessingException:
        results["noise"]["cancelled"] = len(calls)
    comfy.model_management.throw_exception_if_processing_interrupted = real
    comfy.utils.set_progress_bar_global_hook(None)
    results["noise"]["after"] = float((optimise(iterations=1)[0]["samples"] - drawn).abs().max())
    size = call("LoadReward", "incompressibility")[0]
    sum_of_two = embedded.ours("nodes.rewards").Combined(((proxy, 1.0), (heldout, 1.0)))
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(lambda network, given: network(given["input"], given["timestep"], **given["c"]))
    patches = {
        "density": call("DensityGuidance", model, 0.3)[0],
        "guidance": stock_call(nodes_model_advanced.RescaleCFG, model, 0.7)[0],
        "wrapper": wrapped,
    }
    everywhere = [[positive[0][0], {**positive[0][1], "start_percent": 0.0, "end_percent": 1.0}]]
    results["noise"]["heeded"] = float((optimise(iterations=1, positive=everywhere)[0]["samples"] - drawn).abs().max())
    cases = {
        "negative": {"negative": None},
        "gradient": {"reward": size},
        "levels": {"sigmas": few[:2]},
        "range": {"iterations": 0},
        "no prompt": {"prompt": " "},
        "no prompt for a sum": {"prompt": "", "reward": sum_of_two},
        "image": {"latent_image": {"samples": image}},
        "mask": {"latent_image": {**empty, "noise_mask": mask}},
        "area": {"positive": [[positive[0][0], {**positive[0][1], "area": (4, 4, 0, 0)}]]},
        "range of steps": {"negative": [[negative[0][0], {**negative[0][1], "start_percent": 0.0, "end_percent": 0.5}]]},
    }
    cases |= {name: {"model": patched} for name, patched in patches.items()}
    results["noise"]["refused"] = {name: embedded.refused(lambda more=more: optimise(**more)) for name, more in cases.items()}
print(json.dumps(results))
