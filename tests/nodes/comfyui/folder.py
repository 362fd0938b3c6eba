"""Run inside a ComfyUI: a captioned folder as training data, against the headless trainer on the same folder.

Usage: folder.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import contextlib
import io
import json
import tempfile
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import folder_paths
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ours = embedded.ours
here, refused = Path(tempfile.mkdtemp()).resolve(), {}
results = {"refused": refused}
for kind in ("input", "output", "registered", "elsewhere"):
    (here / kind).mkdir()
folder_paths.set_input_directory(str(here / "input"))
folder_paths.set_output_directory(str(here / "output"))
folder_paths.folder_names_and_paths["imagerefl_datasets"] = ([str(here / "registered")], {".foreign"})
extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in asyncio.run(extension.get_node_list())}
results["registered"] = [sorted(part) for part in folder_paths.folder_names_and_paths["imagerefl_datasets"]]
folder, data, runs = ours("nodes.folder"), ours("nodes.training_data"), ours("nodes.run_folders")


def write(path, size, seed, caption, suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    path.with_suffix(suffix).write_text(caption, "utf-8")


def ask(name, action):
    refused[name] = embedded.refused(action)


def read(name, buckets=True, cached=False):
    return N["CaptionedFolder"].execute(folder=name, buckets=buckets, cache_latents_to_disk=cached)


stars = here / "input" / "stars"
write(stars / "2_red" / "a.png", (90, 60), 0, "a red star")
write(stars / "2_red" / "b.jpg", (64, 80), 1, "a large red star, vivid", ".caption")
write(stars / "1_blue" / "c.png", (200, 100), 2, "a blue ring")
write(stars / "1_blue" / "d.png", (64, 64), 3, "a circle")
write(here / "input" / "10_flat" / "e.png", (64, 64), 3, "a circle")
(stars / "1_blue" / "notes.md").write_text("nothing")
(stars / "lonely.txt").write_text("a caption without an image")
write(here / "registered" / "deep" / "er" / "f.png", (64, 64), 4, "a square")
write(here / "elsewhere" / "secret" / "g.png", (64, 64), 5, "a secret")
write(here / "input" / "linked" / "h.png", (64, 64), 6, "a square")
(here / "input" / "linked" / "i.png").symlink_to(here / "elsewhere" / "secret" / "g.png")
write(here / "input" / "linked caption" / "j.png", (64, 64), 6, "a square")
(here / "input" / "linked caption" / "j.txt").unlink()
(here / "input" / "linked caption" / "j.txt").symlink_to(here / "elsewhere" / "secret" / "g.txt")
write(here / "input" / "linked folder" / "k.png", (64, 64), 6, "a square")
(here / "input" / "linked folder" / "more").symlink_to(here / "elsewhere" / "secret")
write(here / "input" / "linked twice" / "p.png", (64, 64), 6, "a square")
(here / "input" / "linked twice" / "within").symlink_to(here / "input" / "linked folder")
write(here / "input" / "inside" / "l.png", (64, 64), 6, "a square")
(here / "input" / "inside" / "m.png").symlink_to(stars / "1_blue" / "d.png")
(here / "input" / "inside" / "m.txt").write_text("linked from within")
(here / "input" / "a link").symlink_to(here / "elsewhere")
write(here / "input" / "no caption" / "n.png", (64, 64), 6, "a square")
write(here / "input" / "no caption" / "o.png", (64, 64), 6, "")
results["folders"] = list(folder.folders())
for name in (
    "linked",
    "linked caption",
    "linked folder",
    "linked twice",
    "a link/secret",
    "../elsewhere/secret",
    "stars/../../elsewhere/secret",
    "no caption",
):
    ask(name, lambda name=name: read(f"input/{name}"))
ask("absolute", lambda: read(str(here / "elsewhere" / "secret")))
results["linked from within"] = read("input/inside").result[0].captions
results["said"] = read("input/stars").result[0].said

fingerprint = lambda **more: N["CaptionedFolder"].fingerprint_inputs(  # noqa: E731
    **{"folder": "input/stars", "buckets": True, "cache_latents_to_disk": False, **more}
)
before = fingerprint()
(stars / "1_blue" / "c.txt").write_text("a blue disc")
caption = fingerprint()
(stars / "1_blue" / "c.txt").write_text("a blue ring")
(stars / "lonely.txt").write_text("another")
results["fingerprint"] = [before == caption, before == fingerprint()]

load = ours("nodes.rewards").load
with torch.inference_mode():
    model, clip, vae = N["DemoModel"].execute().result
    common = {
        "model": model, "vae": vae, "reward": load("demo-proxy"), "clip": clip, "prompts": "",
        "steps": 4, "batch": 2, "accumulate": 1, "lr": 1e-3, "warmup": 0, "max_grad_norm": 1.0, "ema": 0.0, "seed": 0, "save_every": 50,
        "checkpoint_denoiser": False, "rank": 2, "alpha": 2.0, "targets": "to_q, to_k, to_v, to_out.0", "resume": "a new run",
        "preview_every": 0, "preview_cfg": 3.0, "width": 64, "height": 64, "image_size": 64,
        "sampler_steps": 6, "switch_at": 0.5, "refl_share": 0.25, "diffusion_weight": 0.05, "guidance": 1.0,
    }  # fmt: skip

    def train(name, data, **more):
        given = {**common, **more}
        return N["Train"].execute(name=name, dataset=None if data is None else read(*data).result[0], **given).result

    def log(run):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
        return [[line["loss"], line["reward"]] for line in lines]

    def lora(run):
        tensors = load_file(run / "lora.safetensors")
        return torch.cat([tensors[name].flatten().float() for name in sorted(tensors) if "lora_up" in name])

    objective = {"name": "imagerefl", "steps": 6, "grad_from": 3, "grad_to": 5, "start_from": 3, "start_to": 3}
    objective |= {"refl_share": 0.25, "diffusion_weight": 0.05, "guidance_scale": 1.0}
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "lora.rank": 2, "lora.alpha": 2.0, "seed": 0, "image_size": 64}
    settings |= {f"objective.{name}": value for name, value in objective.items()}

    def headless(name, data):
        given = {**settings, "images": data, "buckets": "true", "out": here / name, "model": "demo", "reward": "demo-proxy"}
        with torch.inference_mode(False), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            assert ours("trainer.__main__").main(["train", *(f"--{key}={value}" for key, value in given.items())]) == 0
        return here / name

    results["report"] = train("whole", ("input/stars",))[5]
    there, graph = headless("headless", stars), runs.run_folder("whole", "whole")
    results["log"] = [log(graph), log(there)]
    mine, theirs = lora(graph), lora(there)
    results["lora"] = [float((mine - theirs).norm() / theirs.norm()), float(theirs.norm())]

    # resumed at another seed, with its latents from the disk: the same run as one that was not stopped
    cached = ("input/stars", True, True)
    train("cached", cached, steps=2)
    encode, seen = ours("nodes.latents").Encoder.encode, []
    ours("nodes.latents").Encoder.encode = lambda self, images: (seen.append(len(images)), encode(self, images))[1]
    train("cached", cached, resume=runs.LAST, seed=9)
    results["encoded again"], resumed = list(seen), lora(runs.run_folder("cached", "cached"))
    results["resumed, cached"] = float((resumed - lora(runs.run_folder("whole", "whole"))).abs().max())
    found = read("input/stars").result[0]
    (stars / "1_blue" / "c.txt").write_text("a blue disc")
    ask("changed meanwhile", lambda: N["Train"].execute(name="x", dataset=found, **common))
    ask("a caption changed", lambda: train("cached", cached, resume=runs.LAST, steps=8))
    (stars / "1_blue" / "c.txt").write_text("a blue ring")
    ask("buckets changed", lambda: train("cached", ("input/stars", False, True), resume=runs.LAST, steps=8))
    images = torch.rand(2, 64, 64, 3)
    ask("both", lambda: train("x", cached, images=images))
    ask("prompts", lambda: train("x", cached, prompts="a star"))
    ask("no size", lambda: train("x", cached, image_size=0))
    ask("odd size", lambda: train("x", ("input/stars", False), image_size=60))
    ask("tiny size", lambda: train("x", cached, image_size=4))
    ask("no data", lambda: train("x", None))

    # a blank caption is a caption
    texts = lambda prompts: list(data.training_data(prompts, images, None, (64, 64), 64).texts)  # noqa: E731
    results["captions of two images"] = [texts(prompts) for prompts in ("\na star", "a star\n", "a star", "a\n\nb\n")]
if __name__ == "__main__":
    print(json.dumps(results))
