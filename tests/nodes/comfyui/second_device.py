"""Run inside a ComfyUI: switch, scoring, training and watch on the test suite's second device, against the CPU.

Usage: second_device.py COMFYUI PACK. Prints one JSON line: relative errors, and what was read from the device while sampling.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # or matrix products round by where a weight lies in memory
import embedded  # first: it puts ComfyUI on the path
import comfy.model_management as management
import comfy.ops
import folder_paths
import psutil
import torch
from compare import Case, error

sys.path.insert(0, str(Path(embedded.pack) / "tests"))
from fake_device.strict import install, strict
from torch.nn.attention import SDPBackend, sdpa_kernel

install()  # before the first backward pass, which starts the threads of all devices
folder_paths.set_output_directory(str(Path("output").resolve()))
nodes = asyncio.run(asyncio.run(embedded.module.comfy_entrypoint()).get_node_list())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in nodes}
STEPS, ROWS = 6, 2


# As where there is CUDA; what the list holds while an output has a gradient, which it has in training alone
comfy.ops.SDPA_BACKEND_PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
plain_attention, attended = comfy.ops.scaled_dot_product_attention, set()


def attention(*arguments, **keywords):
    output = plain_attention(*arguments, **keywords)
    attended.add((output.requires_grad, comfy.ops.SDPA_BACKEND_PRIORITY[0].name, torch.backends.cuda.cudnn_sdp_enabled()))
    return output


comfy.ops.scaled_dot_product_attention = attention


def call(node, *arguments, **keywords):
    return N[node].execute(*arguments, **keywords).result


def everything(name):
    """Results of each part as tensors, on the device that ComfyUI has now."""
    model, clip, vae = call("DemoModel")
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    case = Case(encode("a large red star"), encode(""), (ROWS, 4, 8, 8), steps=STEPS, k=3)
    found = {}
    tuned = call("LoadLora", model, "demo-imagerefl", 1.0)[0]
    found["switch"] = case.combined(model, tuned, "euler")
    ranged = call("RangedLora", model, "demo-refl", 1.0, "step", 0, 2)[0]
    found["range"] = case.stock(ranged, "euler")
    images = vae.decode(found["switch"])
    for reward in ("demo-proxy", "demo-heldout", "demo-gold"):
        loaded = call("LoadReward", reward)[0]
        found[reward] = torch.tensor(call("Score", [images], [loaded], ["a large red star"], [False])[0])
    found["diversity"] = torch.tensor(call("Diversity", [images], [""])[0])
    pictures, captions = call("DemoImages", 8, 0)
    settings = {
        "model": model, "vae": vae, "reward": call("LoadReward", "demo-proxy")[0], "prompts": captions, "clip": clip, "images": pictures,
        "heldout": call("LoadReward", "demo-heldout")[0], "steps": 2, "batch": 2, "accumulate": 1, "lr": 1e-3, "warmup": 0,
        "max_grad_norm": 1.0, "ema": 0.0, "seed": 0, "save_every": 50, "checkpoint_denoiser": True, "rank": 2, "alpha": 2.0,
        "targets": "to_q, to_k", "resume": "a new run", "preview_every": 1, "preview_cfg": 3.0, "width": 64, "height": 64, "image_size": 64,
    }  # fmt: skip
    own = {"sampler_steps": 6, "switch_at": 0.5, "refl_share": 0.5, "diffusion_weight": 0.05, "guidance": 2.0}
    _, lora, loss, _, preview, _ = call("Train", name=name, **own, **settings)
    found["loss"], found["preview"] = torch.tensor(loss["loss"]), preview
    found["lora"] = torch.cat([lora[key].float().cpu().flatten() for key in sorted(lora) if "alpha" not in key])
    return {key: value.cpu() for key, value in found.items()}


def memory(device=None, torch_free_too=False, **_):
    free = psutil.virtual_memory().available
    return (free, free) if torch_free_too else free


with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):  # as the device computes attention
    expected = everything("cpu")
management.unload_all_models()
device = torch.device("fake:1")
with strict("cuda") as watched:
    management.get_torch_device = lambda: device
    management.get_free_memory = management.get_total_memory = memory
    management.vram_state = management.VRAMState.NORMAL_VRAM
    with torch.inference_mode():
        found = everything("fake")
    with torch.no_grad():  # inference mode hides copies from the count
        model, clip, _ = call("DemoModel")
        tuned = call("LoadLora", model, "demo-imagerefl", 1.0)[0]
        conds = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a large red star", ""))
        case = Case(*conds, (ROWS, 4, 8, 8), steps=STEPS, k=3)
        case.combined(model, tuned, "euler")  # loads
        on_device = sorted({str(p.device) for p in model.model.parameters()})
        with watched.region() as ours:
            case.combined(model, tuned, "euler")
levels = [t for t in ours.of("read") if "level = float" in str(t)]
other = [t for t in ours.of("read") if t not in levels and "plan = " not in str(t)]  # the stock sampler's plan, in both
print(
    json.dumps(
        {
            "errors": {key: error(found[key].float(), expected[key].float()) for key in expected},
            "device": on_device,
            "attention": sorted(attended),
            "order afterwards": comfy.ops.SDPA_BACKEND_PRIORITY[0].name,
            "reads in the loop": len(levels),
            "other reads": [str(t)[:200] for t in other],
        }
    )
)
