"""Run inside a ComfyUI: the reward, training, judging and demo nodes, called as the executor calls them.

Usage: graph.py COMFYUI PACK. Prints one JSON line. Everything runs under inference mode, as in production.
"""

import asyncio
import json
import sys
from pathlib import Path

sys.modules["diffusers"] = sys.modules["peft"] = None  # a ComfyUI has neither: the nodes must not miss them

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management
import comfy.utils
import folder_paths
import nodes as stock
import torch
from PIL import Image
from safetensors.torch import save_file

folder_paths.set_output_directory(str(Path("output").resolve()))
extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in asyncio.run(extension.get_node_list())}
training, runs = embedded.ours("nodes.graph_run"), embedded.ours("nodes.run_folders")
results = {"refused": {}}


def call(node, *arguments, **keywords):
    return N[node].execute(*arguments, **keywords).result


def refused(name, action):
    results["refused"][name] = embedded.refused(action)


class StopAt:
    """ComfyUI's progress hook: presses Cancel after `step` progress updates."""

    def __init__(self, step):
        self.step, self.values, self.previews = step, [], 0

    def __call__(self, value, total, preview, node_id=None):
        self.values.append(value)
        self.previews += preview is not None
        if value == self.step:
            comfy.model_management.interrupt_current_processing(True)


with torch.inference_mode():
    model, clip, vae = call("DemoModel")
    positive, negative = (stock.CLIPTextEncode().encode(clip, text)[0] for text in ("a large red star, vivid", ""))

    def plain_sample():
        return {"samples": embedded.plain_sample(model, clip)}

    before = plain_sample()
    images = stock.VAEDecode().decode(vae, before)[0]
    proxy, heldout, gold = (call("LoadReward", f"demo-{name}")[0] for name in ("proxy", "heldout", "gold"))

    # rewards
    scores, raw, text, mean = call("Score", [images], [proxy], ["a large red star, vivid"], [False])
    results["z is raw on the stored scale"] = abs((raw[1] - proxy.mean) / proxy.std - scores[1]) < 1e-5
    each = call("Score", [images[:1], images[1:]], [proxy], ["a red star\na blue ring\na star"], [True])[0]
    alone = [call("Score", [images[i : i + 1]], [proxy], [p], [False])[0][0] for i, p in enumerate(("a red star", "a blue ring", "a star"))]
    results["a prompt per image"] = max(abs(a - b) for a, b in zip(each, alone)) < 1e-4
    both = call("CombineRewards", True, reward_a=proxy, weight_a=2.0, reward_b=heldout, weight_b=-0.5)[0]
    expected = 2 * proxy(images.movedim(-1, 1), ["x"] * 3) - 0.5 * heldout(images.movedim(-1, 1), ["x"] * 3)
    results["combined"] = float((both(images.movedim(-1, 1), ["x"] * 3) - expected).abs().max()) < 1e-5 and both.differentiable
    results["gold has no gradient"] = not gold.differentiable
    (kept,), (latents,), indices, best = call("PickBest", [images], [0.5, 2.0, 0.5], [2], [before])
    results["best first, ties in order"] = indices == [1, 0] and best == [2.0, 0.5]
    results["matching latents"] = bool(torch.equal(latents["samples"], before["samples"][[1, 0]])) and latents["batch_index"] == [1, 0]
    results["matching images"] = bool(torch.equal(kept, images[[1, 0]]))
    N["SaveScored"].hidden = type("Hidden", (), {"prompt": {"1": {}}, "extra_pnginfo": {"workflow": {"a": 1}}})
    saved = N["SaveScored"].execute([images], [1.0, 2.0, 3.0], ["a/b"], ["proxy"]).ui["images"]
    opened = Image.open(f"output/{saved[1]['subfolder']}/{saved[1]['filename']}")
    results["score in the file"] = json.loads(opened.text["score"]) == {"proxy": 2.0} and "workflow" in opened.text

    # training
    pictures, captions = call("DemoImages", 8, 0)
    settings = {
        "model": model, "vae": vae, "reward": proxy, "prompts": captions, "clip": clip, "images": pictures, "heldout": heldout,
        "steps": 4, "batch": 2, "accumulate": 1, "lr": 4e-3, "warmup": 0, "max_grad_norm": 1.0, "ema": 0.5, "seed": 0, "save_every": 50,
        "checkpoint_denoiser": True, "rank": 2, "alpha": 2.0, "targets": "to_q, to_k, to_v, to_out.0", "resume": "a new run",
        "preview_every": 2, "preview_cfg": 3.0, "width": 64, "height": 64, "image_size": 64,
    }  # fmt: skip
    own = {"sampler_steps": 6, "switch_at": 0.5, "refl_share": 0.5, "diffusion_weight": 0.05, "guidance": 1.0}
    hook = StopAt(None)
    comfy.utils.set_progress_bar_global_hook(hook)
    tuned, lora, loss, curves, preview, report = call("Train", name="whole", **own, **settings)
    results["progress"], results["previews"] = hook.values, hook.previews
    results["losses"], results["curves"], results["preview"] = len(loss["loss"]), list(curves.shape), list(preview.shape)
    results["report"] = report
    results["base untouched"] = bool(torch.equal(plain_sample()["samples"], before["samples"]))
    results["nothing left on the host"] = not any(
        "forward" in m.__dict__ for m in [*model.model.modules(), *vae.first_stage_model.modules()]
    )

    hook = StopAt(2)
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        call("Train", name="cut", **own, **settings)
    except comfy.model_management.InterruptProcessingException:
        results["cancelled after"] = hook.values[-1]
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    results["base untouched by Cancel"] = bool(torch.equal(plain_sample()["samples"], before["samples"]))
    results["resumable"] = runs.resumable()
    results["the last run of a name"] = runs.run_folder("cut", runs.LAST).name
    resumed = call("Train", name="cut", **own, **{**settings, "resume": runs.LAST, "seed": 5})
    results["a seed of its own"] = json.loads((runs.runs_folder() / "cut" / "config.json").read_text("utf-8"))["seed"]
    results["resumed equals uninterrupted"] = all(torch.equal(lora[k], resumed[1][k]) for k in lora)
    results["resumed losses"] = len(resumed[2]["loss"])

    # the stock loader and the saved file agree with the MODEL that came out
    def automatic(lora_model):
        latent = {"samples": torch.zeros(3, 4, 8, 8)}
        arguments = ("auto", 0.0, 1.0, 1, 6, 3.0, 1.0, "euler", "normal", positive, negative, latent, 1.0)
        return call("CombinedKSampler", model, lora_model, *arguments)[0]

    switched = automatic(tuned)
    again = automatic(embedded.ours("nodes.lora").load(model, runs.runs_folder() / "whole" / "lora.safetensors", 1.0)[0])
    results["file equals MODEL"] = bool(torch.equal(switched["samples"], again["samples"]))
    call("SaveLora", lora, "loras/mine")
    once_more = automatic(embedded.ours("nodes.lora").load(model, Path("output/loras/mine_00001_.safetensors"), 1.0)[0])
    results["saved file equals MODEL"] = bool(torch.equal(switched["samples"], once_more["samples"]))
    results["LoRA has an effect"] = float((switched["samples"] - before["samples"]).abs().max()) > 1e-3
    through_stock, unmatched = embedded.with_lora(model, lora)
    results["unmatched"] = unmatched

    ranges = {"steps": 6, "grad_from": 3, "grad_to": 5, "sigma_high": 0.0, "sigma_low": 0.0}
    weights = {"per_sample": True, "guidance": 1.0, "eta": 1.0, "reward_weight": 1.0, "kl_weight": 0.1}
    objective = call("ObjectiveReFL", **ranges, **weights)[0]
    rest = {k: v for k, v in settings.items() if k not in ("images", "clip", "heldout")}
    aligned = call("AlignTrain", objective=objective, conditioning=positive, name="refl", **rest)
    results["ReFL without images or clip"] = len(aligned[2]["loss"])

    def trained(kind, reward=proxy, **given):
        schema = N[f"Objective{kind}"].define_schema()
        defaults = {i.id: i.default for i in schema.inputs if not getattr(i, "optional", False)}
        made = call(f"Objective{kind}", **{**defaults, "steps": 6, "guidance": 1.0, **given})[0]
        more = {"features": proxy} if kind == "BlackBoxSQDF" else {}
        run = {**rest, "conditioning": None, "reward": reward, "steps": 2, **more}
        return call("AlignTrain", objective=made, clip=clip, name=kind, **run)

    words = {"positive": "crisp, vivid", "negative": "blurred", "sigma_low": 0.4}
    for kind, given in {
        "DRaFTLV": {}, "DRTune": {"k": 2, "early_stop": 2}, "SRPO": words, "SQDF": {"buffer_gb": 1e-4, "collect_every": 2},
        "FlowBPLagrange": {"concentration": "1, 2.5, 1"},
    }.items():  # fmt: skip
        results[f"steps of {kind}"] = len(trained(kind, **given)[2]["loss"])
    box = {"buffer_gb": 1e-4, "queries": "4, 4", "updates_per_loop": 1, "epochs": 2}
    results["steps of BlackBoxSQDF"] = len(trained("BlackBoxSQDF", gold, **box)[2]["loss"])
    results["base untouched by every objective"] = bool(torch.equal(plain_sample()["samples"], before["samples"]))

    # judging
    results["diversity of equal images"] = call("Diversity", [images[:1].repeat(3, 1, 1, 1)], [""])[0]
    results["distance to itself"] = call("Distance", [pictures], [pictures])[:2]

    # bad input
    refused("prompts ≠ images", lambda: call("Score", [images], [proxy], ["a", "b"], [False]))
    refused("empty batch", lambda: call("Score", [images[:0]], [proxy], ["a"], [False]))
    refused("not finite", lambda: call("Score", [images * float("nan")], [proxy], ["a"], [False]))
    refused("missing reward", lambda: call("LoadReward", "no-such"))
    refused("missing weights", lambda: call("LoadReward", "hpsv2.1"))
    refused("no gradient", lambda: call("Train", name="x", **own, **{**settings, "reward": gold}))
    refused("zero images", lambda: call("Train", name="x", **own, **{**settings, "images": pictures[:0]}))
    refused("one image", lambda: call("Diversity", [images[:1]], [""]))
    refused("no images", lambda: call("Train", name="x", **own, **{**settings, "images": None}))
    refused("captions ≠ images", lambda: call("Train", name="x", **own, **{**settings, "prompts": "a\nb"}))
    refused("no prompt", lambda: call("Train", name="x", **own, **{**settings, "prompts": " \n"}))
    refused("no clip", lambda: call("Train", name="x", **own, **{**settings, "clip": None}))
    refused("no such module", lambda: call("Train", name="x", **own, **{**settings, "targets": "nothing"}))
    refused("changed settings", lambda: call("Train", name="x", **own, **{**settings, "resume": "cut", "lr": 1e-3}))
    refused("no run of this name", lambda: call("Train", name="never", **own, **{**settings, "resume": runs.LAST}))
    refused("below the threshold", lambda: call("PickBest", [images], [0.0, 1.0, 2.0], [1], None, [5.0]))
    runs.runs_folder().joinpath("zero.safetensors").write_bytes(b"broken")
    refused("broken LoRA", lambda: embedded.ours("nodes.lora").load(model, runs.runs_folder() / "zero.safetensors", 1.0))
    zero = {k: torch.zeros_like(v) if "lora_up" in k else v for k, v in lora.items()}
    save_file(zero, runs.runs_folder() / "zero.safetensors")
    refused("LoRA without effect", lambda: embedded.ours("nodes.lora").load(model, runs.runs_folder() / "zero.safetensors", 1.0))
    wider = {k: torch.cat([v, v]) if "lora_up" in k else v for k, v in lora.items()}
    save_file(wider, runs.runs_folder() / "wider.safetensors")
    refused("LoRA of another size", lambda: embedded.ours("nodes.lora").load(model, runs.runs_folder() / "wider.safetensors", 1.0))

    class Breaks:
        """A reward that fails at its second look."""

        name, differentiable, patchers, looks = "breaks", True, (), 0

        def __call__(self, pictures, texts):
            self.looks += 1
            if self.looks == 2:
                raise ValueError("the reward broke")
            return pictures.mean((1, 2, 3))

    refused("broken reward", lambda: call("Train", name="broken", **own, **{**settings, "reward": Breaks(), "preview_every": 0}))
    results["nothing left on the host by failures"] = not any(
        "forward" in m.__dict__ for m in [*model.model.modules(), *vae.first_stage_model.modules()]
    )
    changed, (first, weight) = model.clone(), next((n, p) for n, p in model.model.diffusion_model.named_parameters() if p.ndim > 1)
    changed.add_patches({f"diffusion_model.{first}": (torch.ones_like(weight),)})
    known = training._fingerprint(model, [])
    comfy.model_management.load_models_gpu([changed])
    results["a model is known while a LoRA is loaded on a clone"] = training._fingerprint(model, []) == known
    results["and the LoRA was loaded"] = float((changed.model.diffusion_model.get_parameter(first) - weight).abs().max()) > 0.9
    results["only finished or cancelled runs on disk"] = sorted(p.name for p in runs.runs_folder().iterdir() if p.is_dir())
    results["base untouched by failures"] = bool(torch.equal(plain_sample()["samples"], before["samples"]))
    results["plain sample after all"] = embedded.digest(plain_sample()["samples"])
print(json.dumps(results))
