"""Run inside a ComfyUI: lists of images of several sizes, blank prompts, images and scores that are not finite.

Usage: lists.py COMFYUI PACK. Prints one JSON line: what each node gave, or the sentence with which it refused.
"""

import asyncio
import importlib.util
import inspect
import json
import math
import os
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

os.environ["HOME"] = str(Path("home").resolve())  # what a judge's scores are kept in

import embedded  # first: it puts ComfyUI on the path
import execution
import folder_paths
import nodes as stock
import torch
from in_process import Server
from PIL import Image

folder_paths.set_output_directory(str(Path("output").resolve()))
folder_paths.set_temp_directory(str(Path("temp").resolve()))
extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id.removeprefix("ImageReFL"): node for node in asyncio.run(extension.get_node_list())}
rewards, sockets = embedded.ours("nodes.rewards"), embedded.ours("nodes.sockets")
results = {}
PROMPTS = ("a large red star, vivid", "", "a small blue ring")


def text_of(output):
    shown = output.ui if isinstance(output.ui, dict) or output.ui is None else output.ui.as_dict()
    return (shown or {}).get("text", [""])[0]


def case(name, act):
    """The result of a case, or the error."""
    try:
        results[name] = act()
    except Exception as problem:
        results[name] = f"{type(problem).__name__}: {problem}"


def score(images, prompts, per_line=False):
    return N["Score"].execute(images, [proxy], prompts, [per_line])


class Colours:
    """A CLIP_VISION whose features are the mean of each colour, whatever the size."""

    def encode_image(self, image, crop):
        return {"image_embeds": image.mean((1, 2))}


class Seen:
    """A reward that notes where the images were."""

    differentiable, devices = True, ()

    def __call__(self, images, prompts):
        self.devices = (*self.devices, str(images.device))
        return torch.zeros(len(images))


def spread(images):
    """1 − mean cosine of the mean colours over all pairs of images."""
    units = [torch.nn.functional.normalize(one.mean((0, 1)), dim=0) for one in images]
    pairs = [(a, b) for i, a in enumerate(units) for b in units[:i]]
    return 1 - sum(float(a @ b) for a, b in pairs) / len(pairs)


def hidden(node):
    N[node].hidden = type("Hidden", (), {"prompt": {"1": {}}, "extra_pnginfo": {}, "unique_id": None})
    return N[node]


with torch.inference_mode():
    proxy = rewards.load("demo-proxy")
    batch = N["DemoImages"].execute(4, 0).result[0]
    wide = torch.nn.functional.interpolate(batch[1:2].movedim(-1, 1), (64, 96)).movedim(1, -1).contiguous()
    tall = torch.nn.functional.interpolate(batch[3:4].movedim(-1, 1), (80, 64)).movedim(1, -1).contiguous()
    mixed = [batch[:1], wide, batch[2:3], tall]  # sizes in turn: sorting by size alone would change the order
    alone = [score([one], [PROMPTS[0]]).result[0][0] for one in mixed]
    broken, infinite = wide.clone(), batch[2:3].clone()
    broken[0, 3, 3], infinite[0, 0, 0] = float("nan"), float("inf")

    case("sizes", lambda: [score(mixed, [PROMPTS[0]]).result[0], alone])
    case(
        "sizes, batches", lambda: [score([batch[:2], tall], [PROMPTS[0]]).result[0], score([batch[:2]], [PROMPTS[0]]).result[0] + alone[3:]]
    )
    three = mixed[:3]
    blank = [score([batch[i : i + 1]], [prompt]).result[0][0] for i, prompt in enumerate(("", "a"))]
    expected = [score([one], [prompt]).result[0][0] for one, prompt in zip(three, PROMPTS)]
    case("blank in a list", lambda: [score(three, list(PROMPTS)).result[0], expected])
    case("blank beside one", lambda: [score([batch[:2]], ["", "a"]).result[0], score([batch[:2]], ["\na"], True).result[0], blank])
    case("blank line", lambda: [score(three, ["\n".join(PROMPTS)], True).result[0], expected])
    case("blank lines at the end", lambda: [score(three, ["\n".join(PROMPTS) + "\n\n \n"], True).result[0], expected])
    case("blank lines between", lambda: [score([batch[:2]], ["a\n\nb\n"], True).result[0], score([batch[:2]], ["a", "b"]).result[0]])
    case("blank last line", lambda: [score([batch[:2]], ["a\n \n"], True).result[0], score([batch[:2]], ["a", ""]).result[0]])
    both = [score([one], [prompt]).result[0] for one, prompt in ((batch[:2], "a"), (wide, "b"))]
    case("a prompt per batch", lambda: [score([batch[:2], wide], ["a", "b"]).result[0], both[0] + both[1]])

    def partly():
        given = score([batch[:1], broken, infinite, tall], [PROMPTS[0]])
        return [given.result[0], given.result[1], given.result[3], given.result[2], text_of(given), alone]

    case("not finite", partly)
    case("none finite", lambda: score([broken, infinite], ["a"]).result[0])
    combine = N["CombineRewards"].execute
    case(
        "no finite score",
        lambda: N["Score"].execute([batch], [combine(True, reward_a=proxy, weight_a=math.nan).result[0]], ["a"], [False]).result[0],
    )
    case("an empty list", lambda: score([], ["a"]).result[0])
    case("three dimensions", lambda: score([batch[0]], ["a"]).result[0])
    case("bytes", lambda: score([(batch * 255).to(torch.uint8)], ["a"]).result[0])
    registered = folder_paths.folder_names_and_paths["rewards"]
    folder_paths.folder_names_and_paths["rewards"] = ([], set())  # as another pack may leave it
    case("no folder of rewards", lambda: [str(root) for root in rewards.roots()])
    folder_paths.folder_names_and_paths["rewards"] = registered

    def pick(images, scores, k, latents=None):
        given = hidden("PickBest").execute(images, scores, [k], latents)
        pictures, kept, indices, best = given.result
        pictures, kept = (x if isinstance(x, list) else [x] for x in (pictures, kept))
        same = torch.cat(images) if len({one.shape[1:] for one in images}) == 1 else None
        right = same is not None and len(pictures) == 1 and torch.equal(pictures[0], same[indices])
        if same is None:
            right = len(pictures) == len(indices) and all(torch.equal(p, images[i]) for p, i in zip(pictures, indices))
        shapes = [{key: list(v.shape) if torch.is_tensor(v) else v for key, v in one.items()} for one in kept if isinstance(one, dict)]
        found = shapes or getattr(kept[0], "message", kept[0])
        return {"right": right, "latents": found, "indices": indices, "scores": best, "text": text_of(given)}

    latents = [{"samples": torch.full((1, 4, *(n // 8 for n in one.shape[1:3])), float(i))} for i, one in enumerate(mixed)]
    masked = [{**one, "noise_mask": torch.ones(1, *(8 * n for n in one["samples"].shape[2:]))} for one in latents]
    case("pick of sizes", lambda: pick(mixed, [0.0, 3.0, 2.0, 1.0], 3, masked))
    case("pick of one size", lambda: pick([batch], [0.0, 3.0, 2.0, 1.0], 2, [{"samples": torch.zeros(4, 4, 8, 8)}]))
    some = [latents[0], {**latents[2], "noise_mask": torch.ones(64, 64)}]
    case("pick, a mask on one", lambda: pick([batch[:1], batch[2:3]], [0.0, 1.0], 2, some))
    case("pick without latents", lambda: pick([batch], [0.0, 3.0, 2.0, 1.0], 2))
    case("pick beside NaN", lambda: pick([batch], [math.nan, 0.5, math.inf, 1.0], 4))
    case("pick beside a broken image", lambda: pick([batch[:1], infinite], [0.5, 9.0], 2))
    case("pick of NaN alone", lambda: pick([batch[:2]], [math.nan, math.nan], 1))

    def save():
        given = hidden("SaveScored").execute(
            [batch[:1], wide, broken, tall, batch[2:3]], [1.0, 2.0, 3.0, math.nan, 5.0], ["x/%width%"], ["r"]
        )
        files = [Path("output", one["subfolder"], one["filename"]) for one in given.ui["images"]]
        opened = [Image.open(path) for path in files]
        return [[path.name, list(one.size), json.loads(one.text["score"])["r"]] for path, one in zip(files, opened)] + [text_of(given)]

    case("saved", save)

    def diversity(images, prompts=""):
        given = N["Diversity"].execute(images, [prompts], [Colours()])
        return [given.result[0], given.result[1], text_of(given)]

    square = [one[0] for one in mixed]
    case("diversity of sizes", lambda: [*diversity(mixed), spread(square)])
    case("diversity beside NaN", lambda: [*diversity([batch[:1], broken, batch[2:3], tall]), spread([square[0], square[2], square[3]])])
    groups = "a\n\na\n"  # of four images: the second and the last have a blank prompt
    case("diversity, blank line", lambda: [*diversity(mixed, groups + "\n"), (spread(square[::2]) + spread(square[1::2])) / 2])
    case("diversity of one", lambda: diversity([batch[:2], tall], "a\na\nb"))
    case("diversity, the demo's extractor", lambda: N["Diversity"].execute(mixed, [""]).result[0])
    distances = N["Distance"].execute
    whole = torch.cat([batch[:3], batch[1:2]])
    case("distance of lists", lambda: [distances([batch[:1], batch[1:3], wide], [whole], [Colours()]).result[:2]])
    case("distance, said", lambda: text_of(distances([batch], [broken, batch], [Colours()])))

    stub, elsewhere = Seen(), type("Patcher", (), {"load_device": torch.device("meta")})()
    loaded = rewards.Loaded("seen", stub, 0.0, 1.0, (elsewhere,))
    rewards.Loaded.to_device = lambda self: None
    case("device", lambda: [N["Score"].execute([batch], [loaded], ["a"], [False]).result[0], stub.devices])

    known = folder_paths.folder_names_and_paths
    for name, extensions in (("theirs", {".bin", ".pt"}), ("any", set())):
        known["rewards"] = (["/theirs"], extensions)
        rewards.register_folder()
        rewards.register_folder()
        results[f"folder, {name}"] = [len(known["rewards"][0]), known["rewards"][0][0], sorted(known["rewards"][1])]
    del known["rewards"]
    rewards.register_folder()
    results["folder, new"] = [len(known["rewards"][0]), sorted(known["rewards"][1])]


class ThreeSizes:
    """A node whose output is a list of images of several sizes; the second is broken."""

    RETURN_TYPES, OUTPUT_IS_LIST, FUNCTION, CATEGORY = ("IMAGE",), (True,), "make", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def make(self):
        return ([batch[:1], broken, batch[2:3], tall],)


async def executed():
    """The same through ComfyUI's executor: list outputs into list inputs, and a latent output without latents that is connected."""
    stock.NODE_CLASS_MAPPINGS.update({"ThreeSizes": ThreeSizes, **{f"ImageReFL{name}": node for name, node in N.items()}})
    inputs = {
        "1": ("ThreeSizes", {}),
        "2": ("ImageReFLLoadReward", {"name": "demo-proxy"}),
        "3": ("ImageReFLScore", {"images": ["1", 0], "reward": ["2", 0], "prompt": PROMPTS[0], "prompt_per_line": False}),
        "4": ("ImageReFLPickBest", {"images": ["1", 0], "scores": ["3", 0], "k": 4}),
        "5": ("ImageReFLSaveScored", {"images": ["4", 0], "scores": ["4", 3], "filename_prefix": "ran", "reward_name": "r"}),
        "6": ("ImageReFLDemoModel", {}),
        "7": ("VAEDecode", {"samples": ["4", 1], "vae": ["6", 2]}),
        "8": ("PreviewImage", {"images": ["7", 0]}),
    }
    prompt = {number: {"class_type": kind, "inputs": given} for number, (kind, given) in inputs.items()}
    server = Server()
    valid = await execution.validate_prompt("lists", prompt, None)
    assert valid[0] and not valid[3], valid
    known = inspect.signature(execution.PromptExecutor).parameters
    cache = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in known else {}
    await execution.PromptExecutor(server, **cache).execute_async(prompt, "lists", {"client_id": "a browser"}, valid[2])
    stopped = [(data["node_type"], data["exception_message"]) for event, data in server.sent if event == "execution_error"]
    saved = [Image.open(path) for path in sorted(Path("output").glob("ran_*.png"))]
    return [[list(one.size) for one in saved], [json.loads(one.text["score"])["r"] for one in saved], stopped]


def judged():
    """HTTP Judge: a score, refusals, the weights' place in a run's metadata, and Cancel while it hangs."""
    import comfy.model_management as management

    spec = importlib.util.spec_from_file_location("judge_server", Path(embedded.pack) / "tools" / "judge_server.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    hangs, done = threading.Event(), threading.Event()

    class Judge(reference.Judge):
        def do_POST(self):
            if hangs.is_set():
                threading.Timer(0.2, management.interrupt_current_processing).start()
                done.wait(10)
            else:
                super().do_POST()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url, node = f"http://127.0.0.1:{server.server_port}", N["HTTPJudge"]
    judge = node.execute(url, 0.0).result[0]
    scores = N["Score"].execute([batch], [judge], ["a"], [False]).result[0]
    both = combine(False, reward_a=judge, weight_a=2.0, reward_b=proxy, weight_b=1.0).result[0]
    found = {
        "scores": [scores, [float(one.mul(255).round().mean((0, 1)) @ torch.tensor([0.299, 0.587, 0.114])) / 255 for one in batch]],
        "is": [judge.name, judge.differentiable, judge.external, both.external, list(rewards.hashes(both))],
        "fingerprint": node.fingerprint_inputs(url=url) == node.fingerprint_inputs(url=url) == judge.reward.digest,
        "empty": embedded.refused(lambda: node.execute(" ", 0.0)),
        "remote": embedded.refused(lambda: node.execute("http://judge.example.com", 0.0)),
        "zero": embedded.refused(lambda: combine(False, reward_a=judge, weight_a=0.0)),
        "gone": node.fingerprint_inputs(url="http://127.0.0.1:1") != node.fingerprint_inputs(url="http://127.0.0.1:1"),
    }
    hangs.set()
    begin = time.monotonic()
    try:
        judge.raw(torch.rand(1, 3, 8, 8), ["a"])
        found["cancelled"] = "no"
    except management.InterruptProcessingException:
        found["cancelled"] = [time.monotonic() - begin, management.processing_interrupted()]
    done.set()
    server.shutdown()
    return found


case("judged", judged)
case("executed", lambda: asyncio.run(executed()))
print(json.dumps(results))
