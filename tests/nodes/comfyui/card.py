"""Start a ComfyUI server as it is used, on a card or the CPU, and run graphs with the pack's nodes; see tests/nodes/test_card.py.

Usage: card.py COMFYUI PACK FILES OUT [FLAG ...]. FILES: folders of models, made by `card_files.py`. In OUT: a line of results.jsonl as
each graph ends, the images that the graphs saved, and the server's log.
"""

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path

import aiohttp
import live
import torch
from safetensors.torch import load_file
from workflows import api_form, changed

files, out = (Path(p).resolve() for p in sys.argv[3:5])
STEPS, SWITCH = 6, 3
STORAGES = {  # file of the network, weight_dtype of its loader
    "float32": ("float32", "default"),
    "float16": ("float16", "default"),
    "bfloat16": ("bfloat16", "default"),
    "fp8 e4m3": ("float16", "fp8_e4m3fn"),
    "fp8 e5m2": ("float16", "fp8_e5m2"),
    "fp8 fast": ("float16", "fp8_e4m3fn_fast"),
    "fp8 file": ("fp8", "default"),
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def stored(file, dtype):
    """Base and LoRA on a network of that storage: the switch, a stock chain of two samplers, the base alone, and the LoRA alone."""
    prompt = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"),
        "unet": node("UNETLoader", unet_name=f"{file}.safetensors", weight_dtype=dtype),
        "lora": node("LoraLoaderModelOnly", model=["unet", 0], lora_name="tiny.safetensors", strength_model=1.0),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text="a red star"),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=2),
    }
    conds = {"positive": ["positive", 0], "negative": ["negative", 0]}
    plan = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", **conds}
    switch = {"mode": "step", "switch_at": float(SWITCH), "strength": 1.0, "tuned_cfg": 3.0, "seed": 1, "denoise": 1.0}
    models = {"base": ["unet", 0], "tuned": ["lora", 0]}
    prompt["switch"] = node("ImageReFLCombinedKSampler", **models, **switch, **plan, latent_image=["latent", 0])
    whole = {"add_noise": "enable", "noise_seed": 1, "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    first = {**whole, "end_at_step": SWITCH, "return_with_leftover_noise": "enable"}
    second = {**whole, "add_noise": "disable", "start_at_step": SWITCH}
    prompt["first"] = node("KSamplerAdvanced", model=["unet", 0], **first, **plan, latent_image=["latent", 0])
    prompt["chain"] = node("KSamplerAdvanced", model=["lora", 0], **second, **plan, latent_image=["first", 0])
    prompt["plain"] = node("KSamplerAdvanced", model=["unet", 0], **whole, **plan, latent_image=["latent", 0])
    for name in ("switch", "chain", "plain"):
        prompt[f"save {name}"] = node("SaveLatent", samples=[name, 0], filename_prefix=name)
    return prompt


def trained(file, dtype, template):
    """Two steps of training on a network of that storage."""
    given = {"train_steps": 2, "batch_size": 2, "sampler_steps": 4, "width": 128, "height": 128, "image_size": 128, "preview_every": 0}
    prompt = changed(template, "ImageReFLTrainLora", **given, name=f"{file} {dtype}", rank=4)
    number, train = next((i, n) for i, n in prompt.items() if n["class_type"] == "ImageReFLTrainLora")
    checkpoint = train["inputs"]["vae"][0]
    kept = {i: n for i, n in prompt.items() if i in (number, checkpoint) or n["class_type"] in ("ImageReFLLoadReward", "ImageReFLSaveLora")}
    kept[checkpoint]["inputs"]["ckpt_name"] = "tiny.safetensors"
    kept["images"] = node("ImageReFLDemoImages", count=4, seed=0)
    kept[number]["inputs"].update(images=["images", 0], prompts=["images", 1], model=["unet", 0])
    return {**kept, "unet": node("UNETLoader", unet_name=f"{file}.safetensors", weight_dtype=dtype)}


def short(prompts):
    """The templates of the embedded model, each in a few seconds."""
    prompts = {name: changed(prompt, "ImageReFLDemoImages", count=8) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        for kind in ("KSampler", "ImageReFLCombinedKSampler"):  # an ancestral sampler, which searches need, draws its noise on the card
            prompt = changed(prompt, kind, sampler_name="euler")
        prompt = changed(prompt, "ImageReFLTrainLora", train_steps=3, batch_size=2, preview_every=0)
        prompt = changed(prompt, "ImageReFLTrainAnyObjective", train_steps=2, preview_every=0)
        prompt = changed(prompt, "ImageReFLFilterPairs", min_margin=0.0)
        prompts[name] = changed(prompt, "ImageReFLOptimiseNoise", iterations=2)
    few = {method: changed(prompts["demo-reward-search"], "ImageReFLSearch", method=method, budget=160) for method in ("dsearch", "dlbs")}
    return prompts | {f"search {method}": prompt for method, prompt in few.items()}


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


def compared(folder, before):
    """The switch against the stock chain, and what the LoRA changes, of the latents that a graph has saved."""
    found = {name: sorted(set(folder.glob(f"{name}_*.latent")) - before)[-1] for name in ("switch", "chain", "plain")}
    switch, chain, plain = (load_file(found[name])["latent_tensor"].float() for name in found)
    return {"off": rms(switch - chain) / rms(chain), "effect": rms(chain - plain) / rms(plain), "finite": bool(switch.isfinite().all())}


def lora_of(server, name):
    """Whether a run's LoRA is finite, and the size of its second half, which starts at zero."""
    tensors = load_file(server / "output" / "imagerefl" / name / "lora.safetensors")
    ups = [value.float() for key, value in tensors.items() if "lora_up" in key or "lora_B" in key]
    return {"finite": all(bool(value.isfinite().all()) for value in tensors.values()), "moved": max(float(up.abs().max()) for up in ups)}


async def check(server, process, port, say):
    """Queue every graph, one after the other."""
    async with aiohttp.ClientSession() as session:
        client = live.Client(session, f"http://127.0.0.1:{port}")
        described = await client.ready(process, server)
        system = await client.get("/system_stats")
        say({"graph": "start", "devices": [d["name"] for d in system["devices"]]})
        listening = asyncio.create_task(client.listen())
        names = [path for path in sorted((live.pack / "workflows").glob("demo-*.json")) if "your-taste" not in path.stem]
        graphs = {path.stem: api_form(json.loads(path.read_text("utf-8")), described) for path in names}
        template = api_form(json.loads((live.pack / "workflows" / "sd15-train-imagerefl.json").read_text("utf-8")), described)
        graphs = short(graphs)
        graphs |= {f"storage: {name}": stored(*given) for name, given in STORAGES.items()}
        graphs |= {f"training: {name}": trained(*given, template) for name, given in STORAGES.items()}
        for name, prompt in graphs.items():
            begin, before = time.monotonic(), set((server / "output").rglob("*"))
            row = {"graph": name}
            try:
                ended = await client.run(prompt, seconds=100)
                data = ended["data"]
                row["ended"] = ended["type"].removeprefix("execution_")
                if row["ended"] == "error":
                    row["why"] = f"{data.get('node_type')}: {data.get('exception_message', '').strip()}"[:600]
                    row["where"] = "".join(data.get("traceback", [])[-3:])[-900:]
                elif name.startswith("storage"):
                    row |= compared(server / "output", before)
                elif name.startswith("training"):
                    row |= lora_of(server, next(n for n in prompt.values() if n["class_type"] == "ImageReFLTrainLora")["inputs"]["name"])
            except Exception as problem:
                row["ended"] = f"{type(problem).__name__}: {problem}"[:600]
            new = sorted(set((server / "output").rglob("*.png")) - before)
            for i, path in enumerate(new):
                shutil.copy(path, out / f"{name}-{i}.png")
            say({**row, "images": len(new), "seconds": round(time.monotonic() - begin, 1)})
            if process.poll() is not None:
                say({"graph": "the server", "ended": f"exit status {process.returncode}"})
                break
        listening.cancel()


def main():
    out.mkdir(parents=True, exist_ok=True)
    server, port = out / "server", live.free_port()
    process = live.start(server, port, models=files, flags=sys.argv[5:])
    with (out / "results.jsonl").open("w") as file:

        def say(row):
            for target in (file, sys.stdout):
                print(json.dumps(row), file=target, flush=True)

        try:
            asyncio.run(check(server, process, port, say))
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main()
