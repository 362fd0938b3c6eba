"""Run inside a ComfyUI: how the nodes present themselves, and what they draw on themselves while they run.

Usage: presentation.py COMFYUI PACK LORA. Prints one JSON line.
"""

import asyncio
import json
import shutil
import sys
import types
from pathlib import Path

import choosing  # first: it puts ComfyUI on the path
import embedded
import folder_paths
import nodes as stock
import torch
from blueprints import problems
from compare import Case, combined

folder_paths.set_output_directory("output")
run = Path("output/imagerefl/my run")
run.mkdir(parents=True)
Path("output/imagerefl/unfinished").mkdir()
shutil.copy(embedded.arguments[0], run / "lora.safetensors")
asyncio.run(stock.load_custom_node(embedded.pack))
results = {"without aliases": [], "shown": {}, "deprecated": []}
for name, node in stock.NODE_CLASS_MAPPINGS.items():
    if not name.startswith("ImageReFL"):
        continue
    described = node.GET_SCHEMA()
    if not getattr(described, "search_aliases", ["unknown to this ComfyUI"]):
        results["without aliases"].append(name)
    if described.is_deprecated:
        results["deprecated"].append(name)
    inputs = [pair for group in node.INPUT_TYPES().values() if isinstance(group, dict) for pair in group.items()]
    options = {key: value[1] for key, value in inputs if isinstance(value, tuple) and len(value) > 1}
    if any(option.get("advanced") for option in options.values()):
        results["shown"][name] = [key for key, option in options.items() if "default" in option and not option.get("advanced")]

asyncio.run(stock.load_custom_node(str(Path(embedded.comfy_path) / "comfy_extras" / "nodes_primitive.py"), module_parent="comfy_extras"))
blueprints = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((Path(embedded.pack) / "subgraphs").glob("*.json"))}
results["blueprints"] = {name: problems(one, stock.NODE_CLASS_MAPPINGS) for name, one in blueprints.items()}
broken = blueprints["Score and Pick Best"]
for node in broken["definitions"]["subgraphs"][0]["nodes"]:
    node["inputs"][0]["name"] = "nothing"
results["broken"] = problems(broken, stock.NODE_CLASS_MAPPINGS)

lora = embedded.ours("nodes.lora")
results["deprecated"].sort()
results["runs"] = [name for name in lora.names() if name.startswith("run: ")]
results["path"] = lora.path_of("run: my run").is_file()
try:
    lora.path_of("run: unfinished")
except ValueError as problem:
    results["unfinished"] = str(problem)

before = [lora.LoadRewardLora.fingerprint_inputs(lora_name="run: my run") for _ in range(2)]
(run / "lora.safetensors").write_bytes((run / "lora.safetensors").read_bytes() + b" ")
results["fingerprints"] = [before[0] == before[1], before[0] == lora.LoadRewardLora.fingerprint_inputs(lora_name="run: my run")]

results["choosing"] = choosing.results()
drawn = []
server = types.SimpleNamespace(send_progress_text=lambda text, node: drawn.append((text, node)))
sys.modules["server"] = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
rng = torch.Generator().manual_seed(0)
case = Case(*([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in range(2)), steps=8)
with torch.inference_mode():
    base = embedded.ours("nodes.demo").load_model()
    tuned, _ = lora.load(base, lora.path_of("demo-imagerefl"), 1.0)
    combined.CombinedKSampler.hidden = types.SimpleNamespace(unique_id="7")
    for mode, at in (("auto", 0.0), ("step", 0), ("fraction", 1.0)):
        case.combined(base, tuned, "euler", mode=mode, at=at)
results["drawn"] = drawn
print(json.dumps(results))
