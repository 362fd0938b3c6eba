"""Inside a ComfyUI, with its user folder in the current one: Collect Preferences, the choices, and Load Pairs of them."""

import sys
import types
from pathlib import Path

import embedded
import folder_paths
import torch

ours = embedded.ours
GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red star"}},
    "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "seed": 5, "denoise": 1.0}},
    "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
    "5": {"class_type": "ImageReFLTaste", "inputs": {"images": ["4", 0]}},
}


def results():
    """What the nodes did, said and wrote."""
    folder_paths.set_user_directory(str(Path("user").absolute()))
    taste, loading, questions = ours("nodes.taste"), ours("nodes.pairs_files"), ours("trainer.taste.questions")
    sent = []
    server = types.SimpleNamespace(send_sync=lambda event, data: sent.append([event, data]), client_id="tab")
    sys.modules["server"] = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    images = torch.rand(5, 8, 8, 3, generator=torch.Generator().manual_seed(0))

    def run(graph=GRAPH, images=images, **more):
        taste.CollectPreferences.hidden = types.SimpleNamespace(prompt=graph, unique_id="5", extra_pnginfo={"workflow": {"nodes": []}})
        given = {"name": "mine", "ask": "pairs", "n": 4, "person": " ann ", "save_metadata": False, **more}
        return taste.CollectPreferences.execute(images=images, **given)

    def said(node):
        return node.ui.as_dict()["text"][0]

    first = run()
    found = {"passed on": first.result[0] is images, "said": [said(first), said(run())], "told": sent}
    one = questions.Questions(Path("user/default/imagerefl_taste/mine"))
    for question, outcome in zip(one.open(), ("chosen", "tie")):
        one.answer(question.id, outcome, 0 if outcome == "chosen" else None)
    (record, _) = one.choices().records
    found["record"] = [record.prompt, record.person, [image.seed for image in record.images], record.images[0].model]
    found["metadata"] = sorted(key for path in one.folder.glob("images/*") for key in ours("trainer.data.images").Image.open(path).info)
    run(images=1 - images, name="with", save_metadata=True, prompt="another", seed=9, ask="best of n")
    other = questions.Questions(Path("user/default/imagerefl_taste/with"))
    (best,) = other.open()
    found["connected"] = [best.prompt, [image.seed for image in best.images], best.kind]
    found["kept metadata"] = sorted(
        {key for path in other.folder.glob("images/*") for key in ours("trainer.data.images").Image.open(path).info}
    )
    found["listed"] = [name for name in loading.choices() if name.startswith("taste")]
    with open(one.path, "ab") as file:
        file.write(b'{"version"')
    loaded = loading.LoadPairs.execute(table="taste: mine")
    (pair,) = loaded.result[0].pairs
    found["loaded"] = [
        pair.prompt,
        pair.chosen.name == record.images[0].file.name,
        loaded.ui.as_dict()["text"][0].partition("; left out: ")[2],
    ]
    secret = Path("secret.png").absolute()
    secret.write_bytes(pair.chosen.read_bytes())
    pair.rejected.unlink()
    pair.rejected.symlink_to(secret)
    found["refused"] = {
        "link": embedded.refused(lambda: loading.LoadPairs.execute(table="taste: mine")),
        "no prompt": embedded.refused(lambda: run({"5": GRAPH["5"]})),
        "empty prompt": embedded.refused(lambda: run(prompt=" ")),
        "name": embedded.refused(lambda: run(name="../mine")),
        "not finite": embedded.refused(lambda: run(images=images / 0)),
    }
    host, found["users"] = ours("nodes.host"), []
    host.args.multi_user = True
    found["users"].append(embedded.refused(run))
    taste._seen("tab", "ann_1")
    run()
    found["users"] += [
        Path("user/ann_1/imagerefl_taste/mine/open.jsonl").is_file(),
        [name for name in loading.choices() if "taste" in name],
    ]
    taste._seen("tab", "../../outside")
    try:
        run()
    except KeyError as error:
        found["users"].append(str(error))
    host.args.multi_user = False
    del sys.modules["server"]
    return found
