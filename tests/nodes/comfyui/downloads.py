"""Run inside a ComfyUI: the node that downloads a reward, from a hub that is a dictionary.

Usage: downloads.py COMFYUI PACK. Prints one JSON line.
"""

import json
import types
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.model_management
import huggingface_hub

downloads, rewards = embedded.ours("nodes.downloads"), embedded.ours("nodes.rewards")
rewards.folder_paths.models_dir = "models"
rewards.folder_paths.folder_names_and_paths.pop("rewards", None)
rewards.register_folder()
asked, cancel_at = [], None


def fetch(repository, path, revision, local_dir, tqdm_class):
    asked.append(path)
    target = Path(local_dir) / path
    with tqdm_class(total=3, unit="B") as bar:
        for i in range(3):
            if i == cancel_at:
                comfy.model_management.interrupt_current_processing(True)
            bar.update(1)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"weights")
    return str(target)


def call(**values):
    try:
        return downloads.DownloadReward.execute("aesthetic", **values).result[0].splitlines()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


huggingface_hub.hf_hub_download = fetch
huggingface_hub.get_hf_file_metadata = lambda url: types.SimpleNamespace(commit_hash="abc123")
results = {"not accepted": call(accept_licence=False), "asked for without": list(asked)}
cancel_at = 1
results["cancelled"] = call(accept_licence=True)
results["left"] = [str(p) for p in Path("models").rglob("*") if p.is_file()]
comfy.model_management.interrupt_current_processing(False)
cancel_at = None
results["accepted"] = call(accept_licence=True)
number = len(asked)
results["again"], results["asked again"] = call(accept_licence=False), len(asked) - number
Path(results["accepted"][0]).write_bytes(b"others")
results["changed"] = call(accept_licence=True)
print(json.dumps(results))
