"""Run inside a ComfyUI: the embedded model's workflows through validation and PromptExecutor, with caching and a failure.

Usage: executor.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import json
import sys
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import execution
import folder_paths
import nodes as stock
import torch
from in_process import Executor, own_folders
from workflows import api_form, changed

to_pil = embedded.ours("trainer.data.images").to_pil

own_folders()
FILES = (("checkpoints", "ckpt_name"), ("loras", "lora_name"), ("input", "image"), ("diffusion_models", "unet_name"))
FILES += (("text_encoders", "clip_name"), ("vae", "vae_name"))

for name in ("checkpoints", "loras", "diffusion_models", "text_encoders", "vae"):
    Path(name).mkdir()
    folder_paths.add_model_folder_path(name, str(Path(name).resolve()))

results = {"too new": []}


def known(workflow, described):
    """Whether this ComfyUI has the nodes of a workflow, and the type of its text encoder."""
    types = described["CLIPLoader"]["input"]["required"]["type"][0]
    kinds = [node["type"] for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    encoders = [node["widgets_values"][1] for node in workflow["nodes"] if node["type"] == "CLIPLoader"]
    return set(kinds) <= set(described) and set(encoders) <= set(types)


def plain_sample():
    demo = embedded.ours("nodes.demo")
    with torch.inference_mode():
        return embedded.digest(embedded.plain_sample(demo.load_model(), demo.load_clip()))


async def tastes(run, template, executor):
    """The template before there are choices, and after: what waited runs; then likes."""
    folder_paths.add_model_folder_path("rewards", str(Path("rewards").resolve()), is_default=True)
    choices, questions = embedded.ours("trainer.taste.choices"), embedded.ours("nodes.taste").mine
    template = changed(changed(template, "KSampler", steps=1), "EmptyLatentImage", batch_size=2)
    shown = {name for name, node in template.items() if node["class_type"] in ("ImageReFLTaste", "ImageReFLFitTaste")}
    graph = {name: node for name, node in template.items() if name in shown | inputs_of(template, shown)}
    fresh = changed(graph, "")  # ComfyUI marks the nodes of a graph that it has run
    waited = await run("no choices", graph)
    results["a taste without choices waits"] = [waited, texts_of(executor)]
    results["its questions"] = len(questions("demo").open())
    folder = questions("demo").folder
    for i in range(12):
        pictures = [to_pil(torch.full((3, 64, 64), (i + 20 * light) / 32)) for light in (0, 1)]
        images = [choices.save_image(folder, picture) for picture in pictures]
        choices.append(folder / choices.NAME, choices.choice("pair", f"a star {i}", images, "chosen", 0, [i % 2, 1 - i % 2]))
    fit = next(name for name, node in graph.items() if node["class_type"] == "ImageReFLFitTaste")
    grey = {name: {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": color}}
            for name, color in (("dark", 0x202020), ("bright", 0xE0E0E0))}  # fmt: skip
    both = {"class_type": "ImageBatch", "inputs": {"image1": ["dark", 0], "image2": ["bright", 0]}}
    ask = {"class_type": "ImageReFLAskNext", "inputs": {"images": ["both", 0], "tower": graph[fit]["inputs"]["tower"], "prompts": "a star",
                                                        "choices": "demo", "pairs": 2}}  # fmt: skip
    score = {
        "class_type": "ImageReFLScore",
        "inputs": {"images": ["both", 0], "reward": [fit, 0], "prompt": "a star", "prompt_per_line": False},
    }
    asked = {"class_type": "PreviewImage", "inputs": {"images": ["ask", 0]}}
    more = {**fresh, **grey, "both": both, "ask": ask, "asked": asked, "score": score}
    results["a taste of choices"] = await run("choices", more), executor.executor.status_messages[-1][1].get("exception_message")
    sent = [data["output"] for event, data in executor.server.sent if event == "executed" and data["output"]]
    results["what it says"] = texts_of(executor)
    results["asked images"] = len([output for output in sent if "images" in output][-1]["images"])
    twice = {**changed(graph, ""), "twin": changed(graph, "")[fit]}
    results["two of one name"] = await run("twice", twice) or executor.problem()
    results["written"] = [path.name for path in Path("rewards/taste").iterdir()]
    for i in range(8):
        liked = choices.save_image(questions("likes").folder, to_pil(torch.full((3, 64, 64), i / 8)))
        choices.append(questions("likes").path, choices.choice("thumb", "a star", [liked], "liked" if i % 3 else "disliked"))
    pairs, text = embedded.ours("nodes.pairs_files").read("taste: likes")
    batches = embedded.ours("trainer.data.batches")
    results["likes"] = [text, [one.label for one in pairs.listed(batches.Labels)], embedded.refused(lambda: pairs.listed(batches.Pairs))]


def texts_of(executor):
    """What nodes have said so far."""
    return [data["output"]["text"][0] for event, data in executor.server.sent if event == "executed" and "text" in (data["output"] or {})]


def inputs_of(prompt, names):
    """Of a prompt, all nodes that some need."""
    found, left = set(), list(names)
    while left:
        for value in prompt[left.pop()]["inputs"].values():
            if isinstance(value, list) and value[0] not in found:
                found.add(value[0])
                left.append(value[0])
    return found


async def main():
    await stock.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    before = set(sys.modules)
    await stock.load_custom_node(embedded.pack)
    results["modules that the pack brings"] = sorted({name.split(".")[0] for name in set(sys.modules) - before})
    results["plain sample in a fresh process"] = plain_sample()
    described = {name: {"input": kind.INPUT_TYPES()} for name, kind in stock.NODE_CLASS_MAPPINGS.items()}
    executor = Executor()
    run = executor.run

    async def problems(name, prompt):
        """Whether a prompt is valid, and the kinds of errors of its nodes."""
        validity = await execution.validate_prompt(name, prompt, None)
        return validity[0], {error["type"] for node in validity[3].values() for error in node["errors"]}

    prompts = {}
    for path in sorted((Path(embedded.pack) / "workflows").glob("*.json")):
        workflow = json.loads(path.read_text("utf-8"))
        if known(workflow, described):
            prompts[path.stem] = api_form(workflow, described)
        else:
            results["too new"].append(path.stem)
    stable = {name: prompt for name, prompt in prompts.items() if not name.startswith("demo-")}
    results["refused without their files"] = all(["value_not_in_list" in (await problems(*item))[1] for item in stable.items()])
    for prompt in stable.values():
        for node in prompt.values():
            for folder, key in FILES:
                if isinstance(node["inputs"].get(key), str):
                    Path(folder, node["inputs"][key]).write_bytes(b"")
    results["valid with their files"] = [name for name, prompt in stable.items() if await problems(name, prompt) == (True, set())]
    combined = changed(prompts["demo-combined-generation"], "EmptyLatentImage", batch_size=1)
    results["combined"] = await run("combined", combined)
    first = len([1 for event, _ in executor.server.sent if event == "executing"])
    results["again"] = await run("again", combined)
    cached = [data["nodes"] for event, data in executor.server.sent if event == "execution_cached"][-1]
    results["everything cached"] = set(cached) >= {i for i, node in combined.items() if node["class_type"] != "SaveImage"} and first > 5
    results["demo-score-and-pick-best"] = await run("best", changed(prompts["demo-score-and-pick-best"], "KSampler", steps=2))
    cure = changed(prompts["demo-collapse-and-cure"], "KSampler", steps=2)
    results["demo-base-to-few-steps"] = await run("few", changed(prompts["demo-base-to-few-steps"], "EmptyLatentImage", batch_size=1))
    results["demo-collapse-and-cure"] = await run("cure", changed(cure, "ImageReFLCombinedKSampler", steps=2))
    search = changed(changed(prompts["demo-reward-search"], "BasicScheduler", steps=4), "ImageReFLSearch", budget=16)
    results["demo-reward-search"] = await run("search", search)
    noise = changed(changed(prompts["demo-optimise-noise"], "BasicScheduler", steps=1), "ImageReFLOptimiseNoise", iterations=2)
    results["demo-optimise-noise"] = await run("noise", noise)
    guided = changed(changed(prompts["demo-two-model-guidance"], "BasicScheduler", steps=2), "EmptyLatentImage", batch_size=1)
    results["demo-two-model-guidance"] = await run("guided", guided)
    sweep = changed(prompts["demo-trade-off-sweep"], "ImageReFLSweep", steps=4, seeds=2, switches="0, 2, 4")
    results["demo-trade-off-sweep"] = await run("sweep", sweep)
    pairs = changed(changed(prompts["demo-train-on-preferences"], "KSampler", steps=2), "EmptyLatentImage", batch_size=3)
    pairs = changed(pairs, "ImageReFLTrainAnyObjective", train_steps=1, batch_size=2, preview_every=0)
    results["demo-train-on-preferences"] = await run("pairs", changed(pairs, "ImageReFLFilterPairs", min_margin=0.0))
    await tastes(run, prompts["demo-train-on-your-taste"], executor)
    wrong = changed(combined, "ImageReFLCombinedKSampler", mode="step", switch_at=99.0)
    results["a wrong k fails"] = not await run("wrong", wrong)
    results["says why"] = executor.problem()
    results["and the next runs"] = await run("next", combined)


asyncio.run(main())
print(json.dumps(results))
