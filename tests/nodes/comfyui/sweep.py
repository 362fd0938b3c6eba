"""Run inside a ComfyUI: the Trade-off Sweep with one prompt and with several, against single runs and other nodes.

Usage: sweep.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import json

import embedded  # first: it puts ComfyUI on the path
import comfy.utils
import nodes as stock
import torch

extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in asyncio.run(extension.get_node_list())}
sweep, tradeoff = embedded.ours("nodes.sweep"), embedded.ours("nodes.tradeoff")
results = {"refused": {}}


def call(node, *arguments, **keywords):
    return N[node].execute(*arguments, **keywords).result


def refused(name, action):
    try:
        action()
        results["refused"][name] = ""
    except ValueError as problem:
        results["refused"][name] = str(problem)


def cells(text):
    """The rows of a Markdown table, header first."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


class Counted(sweep.Manual):
    """Counts the evaluations of the tuned model."""

    evaluations = 0

    def __call__(self, t, options):
        Counted.evaluations += self.tuned
        return self.tuned


with torch.inference_mode():
    model, clip, vae = call("DemoModel")
    tuned = call("LoadLora", model, "demo-refl", 1.0)[0]
    texts = ["a large red star, vivid", "a small blue ring", "a green square on a white background"]
    negative = stock.CLIPTextEncode().encode(clip, "")[0]
    encoded = {text: stock.CLIPTextEncode().encode(clip, text)[0] for text in texts}
    proxy, heldout = (call("LoadReward", f"demo-{name}")[0] for name in ("proxy", "heldout"))
    settings = {
        "base": model, "tuned": tuned, "negative": negative, "vae": vae, "reward": proxy, "heldout": heldout, "width": 64, "height": 64,
        "seed": 5, "seeds": 3, "steps": 6, "switches": "0, 3, 6", "cfg": 3.0, "tuned_cfg": 1.0, "method": "ddim", "scheduler": "normal",
    }  # fmt: skip

    def swept(text, **more):
        return call("Sweep", **{**settings, "prompt": text, **more})

    # one prompt, as in earlier versions
    grid, plot, text, images = swept(texts[0], positive=encoded[texts[0]])
    results["one prompt"] = [list(grid.shape), list(plot.shape), list(images.shape)]
    one, ends = {"samples": torch.zeros(1, 4, 8, 8)}, []
    for seed in (5, 6, 7):
        latent = stock.KSampler().sample(model, seed, 6, 3.0, "ddim", "normal", encoded[texts[0]], negative, one)[0]
        ends.append(stock.VAEDecode().decode(vae, latent)[0])
    results["k = T against the stock sampler"] = float((images[6:] - torch.cat(ends)).abs().max())
    results["header of one prompt"], results["rows of one prompt"] = cells(text)[0], cells(text)[2:]
    scores = torch.tensor(call("Score", [images], [proxy], [texts[0]], [False])[0]).reshape(3, 3)
    error = scores.std(1) / 3**0.5
    results["one prompt's bounds, by the scorer"] = [[float(m - e), float(m + e)] for m, e in zip(scores.mean(1), error)]
    results["caption of one prompt"] = text.splitlines()[-1]

    # the tuned part with a schedule of its own
    own = {"tuned_steps": 4, "tuned_method": "ddim", "tuned_scheduler": "karras"}
    equal = {"tuned_steps": 6, "tuned_method": "ddim", "tuned_scheduler": "normal"}
    results["equal schedules"] = bool(torch.equal(swept(texts[0], positive=encoded[texts[0]], **equal)[3], images))
    parted = swept(texts[0], positive=encoded[texts[0]], **own)[3]
    ends, middle, sampler = [], [], ("ddim", "normal", encoded[texts[0]], negative, one, 1.0)
    for seed in (5, 6, 7):
        latent = stock.KSampler().sample(tuned, seed, 4, 1.0, "ddim", "karras", encoded[texts[0]], negative, one)[0]
        ends.append(stock.VAEDecode().decode(vae, latent)[0])
        more = {"tuned_steps": 4, "tuned_scheduler": "karras"}
        latent = call("CombinedKSampler", model, tuned, "step", 3, 1.0, seed, 6, 3.0, 1.0, *sampler, **more)[0]
        middle.append(stock.VAEDecode().decode(vae, latent)[0])
    errors = [float((parted[3 * i : 3 * i + 3] - torch.cat(each)).abs().max()) for i, each in enumerate((ends, middle))]
    results["own schedule, at k = 0, in the middle and at k = T"] = [*errors, float((parted[6:] - images[6:]).abs().max())]
    results["own schedule's effect"] = float((parted[:6] - images[:6]).abs().max())

    # several prompts, the base not in the list
    hook = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: hook.append((value, total)))
    sweep.Manual = Counted
    grid, plot, text, several = swept("\n".join(["", *texts, texts[0], " "]), clip=clip, switches="0, 3")
    comfy.utils.set_progress_bar_global_hook(None)
    results["progress"] = [hook[-1][0], sorted({total for _, total in hook})]
    results["tuned evaluations"] = Counted.evaluations
    Counted.evaluations = 0
    alone = torch.stack([swept(text, positive=encoded[text])[3].reshape(3, 3, 64, 64, 3) for text in texts], 1)
    results["tuned evaluations, the base in the list"] = Counted.evaluations
    results["several prompts"] = [list(grid.shape), list(several.shape)]
    results["against runs of one prompt"] = float((several - alone[:2].flatten(0, 2)).abs().max())
    results["header"], results["rows"], results["caption"] = cells(text)[0], cells(text)[2:], text.splitlines()[-1]
    each, proxies = [], []
    for k in range(3):
        own = [call("Diversity", [alone[k, p]], [""])[0] for p in range(3)]
        means = [call("Score", [alone[k, p]], [proxy], [text], [False])[3] for p, text in enumerate(texts)]
        each.append(own)
        proxies.append(means)
    results["diversity of each prompt, by its node"], results["proxy of each prompt, by the scorer"] = each, proxies

    # intervals and the plot, of figures made by hand
    drawn = torch.Generator().manual_seed(0)
    known = {"reward": torch.randn(2, 40, 4, generator=drawn), "held-out": torch.randn(2, 40, 4, generator=drawn)}
    made = tradeoff.Swept((12, 20), 20, known, torch.rand(2, 40, generator=drawn))
    found, normal = made.bounds(), {}
    found |= {f"{name} − base": pairs for name, pairs in made.bounds(over_base=True).items()}
    per_prompt = {**{n: s.mean(2) for n, s in known.items()}, "diversity": made.diversity}
    for name, values in {**per_prompt, **{f"{n} − base": v - v[1] for n, v in per_prompt.items()}}.items():
        half = 1.96 * values.std(1) / 40**0.5
        normal[name] = torch.stack([values.mean(1) - half, values.mean(1) + half], 1).tolist()
    results["bounds"], results["bounds by the normal distribution"] = found, normal
    panel = made.drawn().axes[0]
    stars = [line.get_xydata()[0].tolist() for line in panel.lines if line.get_marker() == "*" and len(line.get_xdata())]
    results["stars"] = stars
    results["bases"] = [[float(made.diversity[1].mean()), float(s[1].mean())] for s in known.values()]
    results["bars"] = [[segment.tolist() for segment in bars.get_segments()] for bars in panel.collections]
    results["points"] = [[float(made.diversity[0].mean()), float(s[0].mean())] for s in known.values()]
    results["labels"] = sorted({t.get_text() for t in panel.texts})

    # bad input
    refused("lines without clip", lambda: swept("a star\na ring", positive=negative))
    refused("neither", lambda: swept("a star"))
    refused("both", lambda: swept("a star", positive=negative, clip=clip))
    refused("blank", lambda: swept(" \n ", clip=clip))
    refused("switches beyond", lambda: sweep.parse_switches("0, 7", 6))
print(json.dumps(results))
