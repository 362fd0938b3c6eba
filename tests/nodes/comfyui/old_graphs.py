"""Runs the workflows of 0.1.0 in ComfyUI's executor, at small sizes, with the demo model in place of checkpoints.

The LoRA is one that 0.1.0 trained for two steps, since the demo's own was trained again.
"""

import json
from pathlib import Path

import numpy as np
from in_process import Executor
from PIL import Image
from safetensors import safe_open

SMALL = {
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 2},
    "KSampler": {"steps": 4, "sampler_name": "euler"},  # versions of ComfyUI add other noise while they sample
    "ImageReFLDemoImages": {"count": 4},
    "ImageReFLTrain": {
        "steps": 2, "batch": 2, "accumulate": 1, "sampler_steps": 4, "width": 64, "height": 64, "image_size": 64, "preview_every": 2,
    },
    "ImageReFLSweep": {"steps": 4, "seeds": 2, "switches": "0, 2, 4"},
    "ImageReFLLoadLora": {"lora_name": "lora.safetensors", "strength": 4.0},
}  # fmt: skip


def without_weights(prompt):
    """A copy of a prompt with few steps and pixels; checkpoints are the demo model, the second one has a LoRA."""
    copy, first = json.loads(json.dumps(prompt)), None
    for number, node in copy.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            del inputs["ckpt_name"]
        if kind == "CheckpointLoaderSimple" and first is None:
            first, node["class_type"] = number, "ImageReFLDemoModel"
        elif kind == "CheckpointLoaderSimple":
            node["class_type"], inputs["model"] = "ImageReFLLoadLora", [first, 0]
        inputs.update(SMALL.get(node["class_type"], {}))
        if kind == "ImageReFLCombinedKSampler":
            inputs.update(SMALL["KSampler"])
            if inputs["mode"] == "step":
                inputs["switch_at"] = 2
    return copy


def summary(path):
    """Mean of the colours in each of 4×4 parts of an image."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    tall, wide = (side // 4 * 4 for side in pixels.shape[:2])
    return np.round(pixels[:tall, :wide].reshape(4, tall // 4, 4, wide // 4, 3).mean((1, 3)).flatten(), 1).tolist()


def lora(name):
    """Tensors and metadata of a run's LoRA."""
    with safe_open(Path("output/imagerefl") / name / "lora.safetensors", "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}, file.metadata()  # noqa: SIM118


async def run(prompts, table):
    """What each graph gave: `True` or the error, and the images that it saved. `table`: old names of a successor's inputs, by the new."""
    ran, images, executor = {}, {}, Executor()
    for name, prompt in prompts.items():
        before = set(Path("output").rglob("*.png"))
        small = without_weights(prompt)
        ran[name] = await executor.run(name, small) or executor.problem()
        images[name] = {path.name: summary(path) for path in sorted(set(Path("output").rglob("*.png")) - before)}
    if table:
        await successor(executor, without_weights(prompts["demo-train-imagerefl"]), table)
    return {"ran": ran, "images": images, "successor equal": lora("demo") == lora("successor") if table else None}


async def successor(executor, prompt, table):
    """Train as the demo's template did, by the node that followed."""
    new = {old: name for name, old in table.items()}
    for node in prompt.values():
        if node["class_type"] == "ImageReFLTrain":
            inputs = {new.get(name, name): value for name, value in node["inputs"].items()}
            node["class_type"], node["inputs"] = "ImageReFLTrainLora", {**inputs, "name": "successor"}
    assert await executor.run("successor", prompt), executor.problem()
