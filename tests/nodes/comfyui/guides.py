"""Run inside a ComfyUI: the Two-Model Guider against the formulas of the papers over two models that share nothing, and the stock guider.

Usage: guides.py COMFYUI PACK PIPELINE LORA STYLE_LORA. Prints one JSON line.
"""

import json
import math

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_apg
import comfy_extras.nodes_cfg
import comfy_extras.nodes_custom_sampler
import comfy_extras.nodes_model_advanced
import latent_preview
import tiny
import torch
from compare import SAMPLERS, combined, error, switch
from safetensors.torch import load_file

guider, proxies = embedded.ours("nodes.guider"), embedded.ours("nodes.proxy")
pipeline_folder, *files = embedded.arguments
rng = torch.Generator().manual_seed(0)
positive, negative = ([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in range(2))
opposite = [[1.5 * negative[0][0] - 0.5 * positive[0][0], {}]]
STEPS, SEED, S, T = 8, 3, 4.0, 1.5
START = torch.zeros(2, 4, 8, 8)
TABLE = "10: 0,1,-2,0,2,0; 1: 3,-2,0,0,0,0; 0.3: 0,0,0,1.5,-0.5,0"


def sigmas_of(model, sampler):
    return comfy.samplers.KSampler(model, STEPS, torch.device("cpu"), sampler, "normal", 1.0, {}).sigmas


def sampled(made, sampler, callback=None):
    """SamplerCustomAdvanced without its node."""
    levels, noise = sigmas_of(made.model_patcher, sampler), comfy.sample.prepare_noise(START, SEED)
    return made.sample(noise, START, comfy.samplers.sampler_object(sampler), levels, callback=callback, disable_pbar=True, seed=SEED)


def ours(name, base, tuned=None, cfg=S, tuned_cfg=T, proxy=None, **settings):
    return guider.guider(base, tuned, guider.guide_of(name, tuned, settings), cfg, tuned_cfg, positive, negative, proxy)


def formula(name, i, b, t):
    """Mix and its unconditional part, as the papers write them; b and t give a model's prediction for "c", "n" or "p"."""
    if name == "rl":
        base, tuned = ([model("n"), model("n") + S * (model("c") - model("n"))] for model in (b, t))
        return [x + 1.6 * (y - x) for x, y in zip(base, tuned)]
    if name == "aig":
        share = (i / STEPS) ** 2
        both = [[model("n"), model("n") + s * (model("c") - model("n"))] for model, s in ((b, S), (t, T))]
        scale = (1 - share) * S + share * T
        uncond = ((1 - share) * (1 - S) * both[0][0] + share * (1 - T) * both[1][0]) / (1 - scale)
        return [uncond, (1 - share) * both[0][1] + share * both[1][1]]
    if name == "autoguidance":
        return [b("c"), b("c") + 2 * (t("c") - b("c"))]
    if name == "npo":
        return [b("n"), b("n") + S * (t("c") - b("n"))]
    if name == "chats":
        return [b("p"), t("c") + S * (t("c") - b("p"))]
    if name == "double-cfg":
        uncond = (S * b("n") - (1 - T) * t("n")) / (S - (1 - T))
        return [uncond, t("n") + S * (b("c") - b("n")) + T * (t("c") - t("n"))]
    raise KeyError(name)


class Apart(comfy.samplers.CFGGuider):
    """The truth: one evaluation for each model and prompt."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        levels = model_options["transformer_options"]["sample_sigmas"]
        i = max(0, int((timestep.max() <= levels[:-1] * (1 + 1e-4)).sum()) - 1)

        def of(model):
            return lambda name: comfy.samplers.calc_cond_batch(model, [self.conds[name]], x, timestep, model_options)[0]

        uncond, denoised = formula(self.name, i, of(self.inner_model), of(self.second))
        for patch in model_options.get("sampler_post_cfg_function", []):  # CFG++ samplers
            denoised = patch({"denoised": denoised, "uncond_denoised": uncond, "model_options": model_options})
        return denoised


def truth(name, base, tuned, sampler):
    made = Apart(base)
    made.inner_set_conds({"c": positive, "n": negative, "p": opposite})
    made.name, made.second = name, tuned.model
    return sampled(made, sampler)


def patched(model):
    """Patches of guidance that ComfyUI has, each on its own clone."""
    return {
        "RescaleCFG": comfy_extras.nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0],
        "APG": comfy_extras.nodes_apg.APG.execute(model, 0.5, 5.0, 0.0).result[0],
        "CFGZeroStar": comfy_extras.nodes_cfg.CFGZeroStar.execute(model).result[0],
        "CFGNorm": comfy_extras.nodes_cfg.CFGNorm.execute(model, 1.0).result[0],
    }


results = {"shared": {}, "two": {}, "equal": {}, "patches": {}, "calls": {}, "refused": {}}
with torch.inference_mode():
    reward, style = map(load_file, files)
    base = embedded.build(pipeline_folder)
    tuned = embedded.with_lora(base, reward)[0]
    apart = embedded.build(pipeline_folder), embedded.with_lora(embedded.build(pipeline_folder), reward)[0]
    apart[1].patch_model()
    apart[1].pre_run()
    other = embedded.with_lora(embedded.build(pipeline_folder), reward)[0]
    given = {"rl": {"weight": 1.6}, "aig": {"power": 2.0}, "autoguidance": {"weight": 2.0}}
    for name in ("rl", "aig", "autoguidance", "npo", "chats", "double-cfg"):
        for sampler in SAMPLERS:
            expected = truth(name, *apart, sampler)
            results["shared"][f"{name}, {sampler}"] = error(sampled(ours(name, base, tuned, **given.get(name, {})), sampler), expected)
            if sampler in ("dpmpp_2m", "heun"):
                found = sampled(ours(name, embedded.build(pipeline_folder), other, **given.get(name, {})), sampler)
                results["two"][f"{name}, {sampler}"] = error(found, expected)
            results["effect"] = min(results.get("effect", 1.0), error(expected, sampled(ours("rl", base, tuned, weight=1.0), sampler)))
    connected = sampled(ours("chats", base, tuned, proxy=proxies.proxy_prompt(positive, negative, 0.5)), "euler")
    results["equal"]["a proxy prompt that is connected"] = torch.equal(connected, sampled(ours("chats", base, tuned), "euler"))

    def plain(model, cfg, sampler="dpmpp_2m", prompts=(positive, negative)):
        made = comfy.samplers.CFGGuider(model)
        made.set_conds(*prompts)
        made.set_cfg(cfg)
        return sampled(made, sampler)

    # identities, bit for bit
    for sampler in ("dpmpp_2m", "euler_cfg_pp"):
        say = lambda text, sampler=sampler: f"{text}, {sampler}"  # noqa: E731
        same = results["equal"]
        same[say("rl 0 is the base")] = torch.equal(sampled(ours("rl", base, tuned, weight=0.0), sampler), plain(base, S, sampler))
        same[say("rl 1 is the tuned model")] = torch.equal(sampled(ours("rl", base, tuned, weight=1.0), sampler), plain(tuned, S, sampler))
        same[say("npo with one model is cfg")] = torch.equal(sampled(ours("npo", base), sampler), plain(base, S, sampler))
        same[say("chats 0 is the winner")] = torch.equal(sampled(ours("chats", base, tuned, cfg=0.0), sampler), plain(tuned, 1.0, sampler))
        anti = plain(base, 1 + S, sampler, (positive, proxies.proxy_prompt(positive, negative, 0.5)))
        same[say("chats with one model is cfg on the proxy prompt")] = torch.equal(sampled(ours("chats", base), sampler), anti)
        made = combined.CombinedGuiderNode.execute(base, tuned, "fraction", 0.75, 1.0, S, T, positive, negative).result[0]
        same[say("combined is the Combined Guider")] = torch.equal(sampled(made, sampler), sampled(ours("combined", base, tuned), sampler))
    results["equal"]["the stock sampler after all that"] = error(plain(base, S), plain(apart[0], S)) == 0.0
    table = sampled(ours("custom", base, tuned, table=TABLE, interpolation="linear"), "euler")
    results["custom"] = [bool(torch.isfinite(table).all()), error(table, plain(base, S, "euler"))]

    # patches of guidance run once, over the whole: as on the stock guider, where it has the same two branches
    for name, model in patched(base).items():
        results["patches"][name] = error(sampled(ours("npo", model), "euler"), plain(model, S, "euler"))
        results["patches"][f"{name} matters"] = error(plain(model, S, "euler"), plain(base, S, "euler"))
        for guide in ("rl", "npo", "autoguidance"):
            pairs = (model, embedded.with_lora(model, reward)[0]), (base, tuned)
            changed, unchanged = (sampled(ours(guide, *pair), "euler") for pair in pairs)
            results["patches"][f"{name} on {guide}"] = error(changed, unchanged)

    # evaluations of the network: rows of each call
    for name, settings in (("npo", {}), ("rl", {}), ("rl", {"weight": 1.0}), ("custom", {"table": "1000: 1,0; 1: 0,1"})):
        seen = []
        hook = base.model.diffusion_model.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(len(inputs[0])))
        sampled(ours(name, base, tuned, **settings), "euler")
        hook.remove()
        results["calls"][f"{name} {settings}"] = seen

    # previews, Cancel, and the host as it was
    shown = []
    sampled(ours("rl", base, tuned), "euler", lambda i, denoised, x, total: shown.append([i, list(denoised.shape), total]))
    results["previews"] = shown
    results["preview made"] = latent_preview.prepare_callback(ours("rl", base, tuned).model_patcher, STEPS) is not None
    before = plain(base, S)
    for kind in (comfy.model_management.InterruptProcessingException, RuntimeError):
        seen = []

        def stop(_module, _inputs, seen=seen, kind=kind):
            seen.append(1)
            if len(seen) == 7:
                raise kind

        hook = base.model.diffusion_model.register_forward_pre_hook(stop)
        try:
            sampled(ours("rl", base, tuned), "euler")
        except kind:
            results[f"untouched by {kind.__name__}"] = len(seen) == 7 and torch.equal(plain(base, S), before)
        hook.remove()
    real, asked = comfy.model_management.throw_exception_if_processing_interrupted, []
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: asked.append(1)
    sampled(ours("rl", base, tuned), "euler")
    comfy.model_management.throw_exception_if_processing_interrupted = real
    results["asked for Cancel"] = len(asked)

    # NPO's mix of weights: the negative model has both LoRAs, and shares the weights of the positive one
    mixed = embedded.with_lora(tuned, style, 0.7)[0]
    alone = embedded.with_lora(embedded.with_lora(embedded.build(pipeline_folder), reward)[0], style, 0.7)[0]
    results["npo, mixed weights"] = error(sampled(ours("npo", mixed, tuned), "dpmpp_2m"), truth("npo", alone, apart[1], "dpmpp_2m"))

    def flipped():
        levels = sigmas_of(base, "euler").flip(0)
        ours("rl", base, tuned).sample(START, START, comfy.samplers.sampler_object("euler"), levels, disable_pbar=True, seed=SEED)

    short = [[negative[0][0][:, :50], {}]]
    masked = [[negative[0][0], {"attention_mask": torch.ones(1, 77)}]]
    say, flow = embedded.refused, base.clone()
    widgets = dict(guide="rl", cfg=S, tuned_cfg=1.0, positive=positive, negative=negative, tuned=tuned)

    def by_node(**given):
        return guider.TwoModelGuiderNode.execute(base, **{**widgets, **given})

    loser = tuned.clone()
    loser.set_attachments(guider.ATTACHMENT, {"guide": "chats", "adapter": "tuned-loser"})
    flow.add_object_patch(
        "model_sampling",
        type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})(),
    )
    results["refused"] = {
        "equal models": say(lambda: ours("rl", base, base.clone())),
        "another family": say(lambda: ours("rl", base, flow)),
        "sum": say(lambda: ours("custom", base, tuned, table="1: 0.5, 0.6")),
        "no table": say(lambda: ours("custom", base, tuned, table="")),
        "power": say(lambda: ours("aig", base, tuned, power=0.0)),
        "auto": say(lambda: ours("combined", base, tuned, switch="auto")),
        "no such switch": say(lambda: sampled(ours("combined", base, tuned, switch="late"), "euler")),
        "beyond": say(lambda: sampled(ours("combined", base, tuned, switch="9"), "euler")),
        "no step": say(lambda: sampled(ours("rl", base, tuned, start=0.5, end=0.5), "euler")),
        "rising": say(flipped),
        "tuned_cfg": say(lambda: by_node(guide="rl", tuned_cfg=2.0)),
        "one model": say(lambda: by_node(guide="rl", tuned=None)),
        "proxy of rl": say(lambda: by_node(guide="rl", proxy_prompt=negative)),
        "proxy of 0": say(lambda: by_node(guide="chats", proxy=0.0, proxy_prompt=negative)),
        "loser": say(lambda: by_node(guide="chats", tuned=loser)),
        "two negatives": say(lambda: proxies.proxy_prompt(positive, negative * 2, 0.5)),
        "lengths": say(lambda: proxies.proxy_prompt(positive, short, 0.5)),
        "no padding": say(lambda: proxies.proxy_prompt([[positive[0][0][:, :20], {}]], [[negative[0][0][:, :10], {}]], 0.5)),
        "masked": say(lambda: proxies.proxy_prompt(positive, masked, 0.5)),
        "pooled": say(lambda: proxies.proxy_prompt(positive, [[negative[0][0], {"pooled_output": torch.ones(1, 8)}]], 0.5)),
        "switched": say(lambda: ours("rl", switch.switched(base, tuned, switch.Rule("step", 4)), tuned)),
    }
    twice = [[torch.cat([positive[0][0]] * 2, 1), {"pooled_output": torch.ones(1, 8), "area": 1}]]
    far = proxies.proxy_prompt(twice, [[negative[0][0], {"pooled_output": torch.zeros(1, 8)}]], 0.5)
    results["proxy"] = [list(far[0][0].shape), far[0][1]["pooled_output"].mean().item(), far[0][1]["area"]]
    results["proxy"].append(error(far[0][0], 1.5 * torch.cat([negative[0][0]] * 2, 1) - 0.5 * twice[0][0]))

    # density guidance over any guider, and the length of noise
    class Denser(comfy.samplers.CFGGuider):
        """The truth: η = 1 + √(2N)·Φ⁻¹(0.3) / ‖ε̂‖² by hand, on what another guider predicts."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.other.inner_model, self.other.conds = self.inner_model, self.conds
            clean = self.other.predict_noise(x, timestep, model_options, seed)
            signal = 1 - timestep if self.flow else torch.ones_like(timestep)
            out = []
            for one, d, a, s in zip(x.double(), clean.double(), signal.double(), timestep.double()):
                epsilon = (one - a * d) / s
                eta = 1 - math.sqrt(2 * one.numel()) * 0.5244005127080407 / float(epsilon.square().sum())
                out.append(d if a < 1e-3 else d - (eta - 1) * s / a * epsilon)
            return torch.stack(out).to(x)

    def denser(made, flow=False):
        over = Denser(made.model_patcher)
        over.other, over.flow, over.original_conds = made, flow, made.original_conds
        return over

    detail = embedded.ours("nodes.detail")
    results["density"] = {}
    dial = lambda model, q=0.3: detail.DensityGuidance.execute(model, q).result[0]  # noqa: E731
    dense = dial(base)
    for sampler in ("euler", "dpmpp_2m", "euler_cfg_pp"):
        expected = sampled(denser(ours("npo", base)), sampler)
        results["density"][sampler] = error(plain(dense, S, sampler), expected)
    results["density"]["over a guide"] = error(
        sampled(ours("rl", dense, embedded.with_lora(dense, reward)[0]), "euler"), sampled(denser(ours("rl", base, tuned)), "euler")
    )
    results["density matters"] = error(plain(dense, S), plain(base, S))
    results["density 0.5"] = dial(base, 0.5) is base
    START, wide = (
        torch.zeros(2, 16, 8, 8),
        [[[torch.randn(1, 77, 4096, generator=rng), {"pooled_output": torch.randn(1, 2048)}]] for _ in "ab"],
    )
    positive, negative = wide
    streaming = tiny.sd3(1)
    results["density"]["flow"] = error(
        plain(dial(streaming), S, "euler", (positive, negative)), sampled(denser(ours("npo", streaming), True), "euler")
    )
    noise = comfy_extras.nodes_custom_sampler.Noise_RandomNoise(3)
    given = {"samples": torch.zeros(3, 4, 8, 8)}
    drawn, longer = (one.generate_noise(given) for one in (noise, detail.NoiseLength.execute(noise, 0.5, 1.1).result[0]))
    results["noise"] = [longer.flatten(1).norm(dim=1).tolist(), error(longer / longer.norm() * drawn.norm(), drawn)]
    results["noise as drawn"] = torch.equal(detail.NoiseLength.execute(noise, 0.0, 1.0).result[0].generate_noise(given), drawn)
print(json.dumps(results))
