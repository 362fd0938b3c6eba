"""Start a real ComfyUI server with the pack installed, and use it over HTTP and websocket as the browser does.

Usage: live.py COMFYUI PACK. Prints one JSON line. Works in the current folder.
"""

import asyncio
import hashlib
import json
import re
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import aiohttp
from workflows import api_form, changed

comfy_path, pack = (Path(p) for p in sys.argv[1:3])
TEXT = (3).to_bytes(4, "big")  # the kind of a binary message that draws text on a node


def start(folder, port, models=None, flags=("--cpu",)):
    """The server, with the pack under custom_nodes and nothing of its own written outside `folder`; `models` holds further files."""
    nodes = folder / "custom_nodes"
    nodes.mkdir(parents=True)
    (nodes / "comfyui-imagerefl").symlink_to(pack.resolve())
    for name in ("output", "temp", "user", "input"):
        (folder / name).mkdir()
    lines = [f"custom_nodes: {nodes.resolve()}"]
    if models is not None:
        lines += [f"{kind.name}: {kind.resolve()}" for kind in sorted(models.iterdir())]
    (folder / "extra.yaml").write_text("test:\n" + "".join(f"  {line}\n" for line in lines), "utf-8")
    command = [sys.executable, comfy_path / "main.py", *flags, "--port", port, "--disable-api-nodes", "--preview-method", "latent2rgb"]
    command += ["--extra-model-paths-config", folder / "extra.yaml", "--database-url", "sqlite:///:memory:"]
    for name in ("output", "temp", "user", "input"):
        command += [f"--{name}-directory", folder / name]
    log = open(folder / "server.log", "w")  # noqa: SIM115  the server writes to it as long as it lives
    return subprocess.Popen([str(c) for c in command], cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """One browser."""

    def __init__(self, session, base):
        self.session, self.base, self.id = session, base, uuid.uuid4().hex
        self.seen, self.texts, self.previews = [], [], 0

    async def listen(self):
        async with self.session.ws_connect(f"{self.base}/ws?clientId={self.id}", max_msg_size=0) as stream:
            async for message in stream:
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT:
                    self.texts.append(message.data)
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self.previews += 1
                elif message.type == aiohttp.WSMsgType.TEXT:
                    self.seen.append(json.loads(message.data))

    async def get(self, path):
        async with self.session.get(self.base + path) as answer:
            return await answer.json()

    async def ready(self, process, folder):
        """The nodes, once the server answers."""
        begin = time.monotonic()
        while True:
            try:
                return await self.get("/object_info")
            except aiohttp.ClientError:
                assert process.poll() is None and time.monotonic() - begin < 180, (folder / "server.log").read_text()[-3000:]
                await asyncio.sleep(0.3)

    async def queue(self, prompt):
        async with self.session.post(self.base + "/prompt", json={"prompt": prompt, "client_id": self.id}) as answer:
            body = await answer.json()
            return body["prompt_id"] if answer.status == 200 else body

    async def until(self, prompt_id, *kinds, seconds=240):
        """The first event of these kinds for a prompt."""
        for _ in range(seconds * 50):
            for event in self.seen:
                if event["type"] in kinds and event["data"].get("prompt_id") == prompt_id:
                    return event
            await asyncio.sleep(0.02)
        raise TimeoutError(f"no {kinds} for {prompt_id}; last: {self.seen[-3:]}")

    async def run(self, prompt, seconds=240):
        """Queue and wait; returns the event that ended it."""
        prompt_id = await self.queue(prompt)
        assert isinstance(prompt_id, str), prompt_id
        return await self.until(prompt_id, "execution_success", "execution_error", "execution_interrupted", seconds=seconds)


def resident_mb(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def pictures(folder, prefix):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "output" / "ImageReFL").glob(f"{prefix}*.png"))}


def journey(prompts, lora):
    """Load Reward LoRA, Combined KSampler (auto), Reward Scorer, Pick Best, Save Image with Score, from two of the templates."""
    prompt = json.loads(json.dumps(prompts["demo-score-and-pick-best"]))
    loader, sampler = (
        next(node for node in prompts["demo-combined-generation"].values() if node["class_type"] == kind)
        for kind in ("ImageReFLLoadLora", "ImageReFLCombinedKSampler")
    )
    number, plain = next((i, node["inputs"]) for i, node in prompt.items() if node["class_type"] == "KSampler")
    prompt["lora"] = {**loader, "inputs": {**loader["inputs"], "model": plain["model"], "lora_name": lora}}
    links = {"base": plain["model"], "tuned": ["lora", 0], **{key: plain[key] for key in ("positive", "negative", "latent_image")}}
    prompt[number] = {**sampler, "inputs": {**sampler["inputs"], **links, "mode": "auto"}}
    return changed(prompt, "EmptyLatentImage", batch_size=6)


async def check(folder, process, port):
    results = {}
    async with aiohttp.ClientSession() as session:
        client = Client(session, f"http://127.0.0.1:{port}")
        described = await client.ready(process, folder)
        listening = asyncio.create_task(client.listen())
        templates = (await client.get("/api/workflow_templates"))["comfyui-imagerefl"]
        known = {*described, "MarkdownNote", "Note"}
        workflows = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted((pack / "workflows").glob("*.json"))}
        results["every workflow is a template"] = sorted(templates) == sorted(workflows)
        # templates for the models of 2026 have stock nodes that older versions lack
        here = {name: w for name, w in workflows.items() if name.startswith("demo-") or {n["type"] for n in w["nodes"]} <= known}
        prompts = {name: api_form(workflow, described) for name, workflow in here.items()}
        async with session.get(f"{client.base}/extensions/comfyui-imagerefl/docs/ImageReFLTrainLora.md") as page:
            results["help page"] = page.status == 200 and "resume" in await page.text()

        combined = changed(prompts["demo-combined-generation"], "EmptyLatentImage", batch_size=2)
        results["combined"] = (await client.run(combined))["type"]
        results["progress"] = any(e["type"] == "progress" and e["data"]["max"] == 20 for e in client.seen)
        results["previews"] = client.previews > 0
        first = pictures(folder, "base")

        short = changed(prompts["demo-train-imagerefl"], "ImageReFLTrainLora", train_steps=3, batch_size=2, preview_every=0)
        short = changed(changed(short, "ImageReFLDemoImages", count=8), "EmptyLatentImage", batch_size=1)
        noise = changed(prompts["demo-optimise-noise"], "ImageReFLOptimiseNoise", iterations=2)
        pairs = changed(changed(prompts["demo-train-on-preferences"], "KSampler", steps=2), "ImageReFLTrainAnyObjective", train_steps=2)
        pairs = changed(changed(pairs, "ImageReFLTrainAnyObjective", preview_every=0), "ImageReFLFilterPairs", min_margin=0.0)
        sweep = changed(prompts["demo-trade-off-sweep"], "ImageReFLSweep", seeds=2, switches="0, 12")
        search = changed(prompts["demo-reward-search"], "ImageReFLSearch", budget=80)
        shorter = {"demo-train-imagerefl": short, "demo-optimise-noise": noise, "demo-train-on-preferences": pairs}
        shorter |= {"demo-trade-off-sweep": sweep, "demo-reward-search": search}
        for name, prompt in {**prompts, **shorter}.items():
            if name.startswith("demo-") and name != "demo-combined-generation":
                results[name] = (await client.run(prompt))["type"]
        saved = [p.read_bytes() for p in (folder / "output" / "loras").glob("*.safetensors")]
        results["lora saved with its switch"] = len(saved) == 1 and b"switch_sigma" in saved[0]
        results["scores drawn on the node"] = any(b"mean " in text and b"image 0: " in text for text in client.texts)

        long = changed(short, "ImageReFLTrainLora", train_steps=20, name="cancelled")
        client.seen.clear()
        running = await client.queue(long)
        while not any(e["type"] == "progress" and e["data"]["max"] == 20 and e["data"]["value"] >= 2 for e in client.seen):
            await asyncio.sleep(0.02)
        pressed = time.monotonic()
        async with session.post(f"{client.base}/interrupt", json={"prompt_id": running}) as answer:
            assert answer.status == 200
        results["cancel"] = (await client.until(running, "execution_interrupted", "execution_success", "execution_error"))["type"]
        results["seconds from Cancel to its answer"] = round(time.monotonic() - pressed, 2)
        results["state saved"] = (folder / "output" / "imagerefl" / "cancelled" / "checkpoint.pt").is_file()
        offered = (await client.get("/object_info/ImageReFLTrainLora"))["ImageReFLTrainLora"]["input"]["required"]["resume"]
        results["resume offers it"] = "cancelled" in (offered[0] if isinstance(offered[0], list) else offered[1]["options"])

        # on from the checkpoint, and from the run's LoRA to a saved picture: nothing is typed but the name of the run
        resumed = changed(long, "ImageReFLTrainLora", resume="the last run of this name", train_seed=12345)
        results["resumed"] = (await client.run(resumed))["type"]
        log = (folder / "output" / "imagerefl" / "cancelled" / "log.jsonl").read_text().splitlines()
        results["steps logged"] = [json.loads(line)["step"] for line in log]
        results["used"] = (await client.run(journey(prompts, "run: cancelled")))["type"]
        results["saved with scores"] = sum(b"demo-proxy" in p.read_bytes() for p in (folder / "output" / "ImageReFL").glob("best*.png"))
        drawn = [found.group() for text in client.texts if (found := re.search(rb"tuned from step \d+ of \d+", text))]
        results["switch drawn on the node"] = drawn[-1].decode() if drawn else ""

        beyond = changed(combined, "ImageReFLCombinedKSampler", mode="step", switch_at=21.0)
        failed = await client.run(beyond)
        results["red node"] = (failed["data"].get("node_type"), failed["data"].get("exception_message", "").strip())
        refused = await client.queue(changed(prompts["demo-two-checkpoints"], "ImageReFLCombinedKSampler", cfg=-1.0))
        results["refused before it runs"] = "node_errors" in refused and len(refused["node_errors"]) == 1
        # a file name carries a counter, its bytes the whole workflow: compare pixels of a fresh run with the first one's
        again = changed(combined, "KSampler", steps=19)
        await client.run(again)
        await client.run(combined)
        results["same picture after all that"] = list(pictures(folder, "base").values())[-len(first) :] == list(first.values())

        small = changed(changed(combined, "KSampler", steps=2), "ImageReFLCombinedKSampler", steps=2, mode="step", switch_at=1.0)
        small = changed(small, "EmptyLatentImage", batch_size=1)
        queued = []
        for seed in range(100):
            one = changed(changed(small, "KSampler", seed=seed), "ImageReFLCombinedKSampler", seed=seed)
            queued.append(await client.queue(one))
        memory = []
        for prompt_id in queued:
            ended = await client.until(prompt_id, "execution_success", "execution_error")
            assert ended["type"] == "execution_success", ended
            memory.append(resident_mb(process.pid))
        results["MB grown between prompt 20 and 100"] = round(memory[-1] - memory[19], 1)
        listening.cancel()
    return results


def main():
    work = Path(tempfile.mkdtemp())
    folder, port = work / "server", free_port()
    process = start(folder, port)
    try:
        print(json.dumps(asyncio.run(check(folder, process, port))))
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(work)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
