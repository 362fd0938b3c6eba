"""Collect Preferences in ComfyUI's own frontend: keyboard and mouse, a reload, undo, two tabs.

Needs Chromium, and playwright from `.[comfy]`. Usage: taste_browser.py COMFYUI PACK SCREENSHOTS classic|vue (Nodes 2.0).
"""

import asyncio
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import aiohttp
import live
from PIL import Image, ImageStat
from playwright.async_api import async_playwright

screenshots, look = Path(sys.argv[3]).resolve(), sys.argv[4]
PANEL = ".imagerefl-taste"
NODES = [  # class, place, size, widgets, inputs: name, type, node, slot
    ("ImageReFLDemoModel", (0, 0), (250, 80), [], [], ["MODEL", "CLIP", "VAE"]),
    ("CLIPTextEncode", (280, 0), (300, 110), ["a large star on a grey background"], [("clip", "CLIP", 1, 1)], ["CONDITIONING"]),
    ("CLIPTextEncode", (280, 160), (300, 110), [""], [("clip", "CLIP", 1, 1)], ["CONDITIONING"]),
    ("EmptyLatentImage", (280, 320), (300, 110), [64, 64, 8], [], ["LATENT"]),
    (
        "KSampler",
        (610, 0),
        (280, 270),
        [1, "fixed", 12, 2.0, "euler_ancestral", "simple", 1.0],
        [
            *(("model", "MODEL", 1, 0), ("positive", "CONDITIONING", 2, 0)),
            *(("negative", "CONDITIONING", 3, 0), ("latent_image", "LATENT", 4, 0)),
        ],
        ["LATENT"],
    ),
    ("VAEDecode", (610, 330), (280, 50), [], [("samples", "LATENT", 5, 0), ("vae", "VAE", 1, 2)], ["IMAGE"]),
    ("ImageReFLTaste", (930, 0), (520, 720), ["taste", "pairs", 4, "", False], [("images", "IMAGE", 6, 0)], ["IMAGE"]),
]
STATE = """() => { const panel = document.querySelector('.imagerefl-taste')
    return {said: panel.querySelector('.said').textContent, prompt: panel.querySelector('.prompt').textContent,
        loaded: [...panel.querySelectorAll('img')].filter(one => one.naturalWidth).length,
        focused: panel.contains(document.activeElement)} }"""
KEY = "(panel, key) => panel.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}))"
ALONE = """() => { const node = app.graph.nodes.find(node => node.type === 'ImageReFLTaste')
    app.canvas.selectNode(node); app.extensionManager.command.execute('Comfy.Canvas.FitView') }"""
BOX = """() => { const node = app.graph.nodes.find(node => node.type === 'ImageReFLTaste'), {scale, offset} = app.canvas.ds
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    if (drawn) return [drawn.x, drawn.y, drawn.width, drawn.height]
    const canvas = app.canvas.canvas.getBoundingClientRect(), [x, y, w, h] = node.boundingRect ?? node.getBounding()
    return [canvas.left + (x + offset[0]) * scale, canvas.top + (y + offset[1]) * scale, w * scale, h * scale] }"""


def workflow(name, ask, seed, batch):
    """The demo model's images at a Taste node, as the browser saves it."""
    nodes, links = [], []
    for i, (kind, at, size, widgets, sockets, outputs) in enumerate(NODES, 1):
        own = {"ImageReFLTaste": [name, ask, *widgets[2:]], "KSampler": [seed, *widgets[1:]], "EmptyLatentImage": [64, 64, batch]}
        values = own.get(kind, widgets)
        made = {
            "id": i,
            "type": kind,
            "pos": [*at],
            "size": [*size],
            "flags": {},
            "order": i,
            "mode": 0,
            "properties": {},
            "widgets_values": values,
            "inputs": [],
        }
        made["outputs"] = [{"name": one, "type": one, "links": [], "slot_index": k} for k, one in enumerate(outputs)]
        for place, (socket_, type_, source, slot) in enumerate(sockets):
            links.append([len(links) + 1, source, slot, i, place, type_])
            nodes[source - 1]["outputs"][slot]["links"].append(len(links))
            made["inputs"].append({"name": socket_, "type": type_, "link": len(links)})
        nodes.append(made)
    counted = {"last_node_id": len(nodes), "last_link_id": len(links), "revision": 0, "version": 0.4}
    return {
        "id": "5f0e0a4e-0000-4000-8000-000000000000",
        **counted,
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
    }


class Tab:
    """One page of the frontend, and the server behind it."""

    def __init__(self, page, base, session):
        self.page, self.base, self.session = page, base, session

    async def ready(self):
        await self.page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.command")
        await self.page.wait_for_timeout(6000)
        await self.page.keyboard.press("Escape")  # the dialog of a first start
        await self.page.wait_for_timeout(1000)

    async def show(self, name="taste", ask="pairs", seed=1, batch=8):
        await self.page.evaluate("graph => app.loadGraphData(graph, true, true, 'choosing')", workflow(name, ask, seed, batch))
        await self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")  # away from messages in the corner
        await self.page.wait_for_timeout(2500)

    async def json(self, path, **query):
        async with self.session.get(self.base + path, params=query) as answer:
            return await answer.json()

    async def counts(self, name="taste"):
        found = await self.json("/imagerefl/taste", name=name)
        return {**found["counts"], "open": found["open"]}

    async def run(self):
        """Queue, and wait for the end."""
        before = len(await self.json("/history"))
        await self.page.evaluate("() => app.queuePrompt(0)")
        for _ in range(600):
            history = await self.json("/history")
            if len(history) > before and all(one["status"]["completed"] for one in history.values()):
                break
            await asyncio.sleep(0.2)
        else:
            raise TimeoutError(json.dumps([one["status"] for one in history.values()])[-2000:])
        await self.page.wait_for_timeout(1500)

    async def press(self, *keys, focus=True):
        if focus:
            await self.page.locator(f"{PANEL} .prompt").click()
        for key in keys:
            await self.page.keyboard.press(key)
            await self.page.wait_for_timeout(900)

    async def redness(self, name, sha256):
        """Mean red minus mean blue of an image of a question."""
        async with self.session.get(f"{self.base}/imagerefl/taste/image", params={"name": name, "sha256": sha256}) as answer:
            red, _, blue = ImageStat.Stat(Image.open(io.BytesIO(await answer.read()))).mean
            return red - blue

    async def choose_the_redder(self, name, pairs):
        """By keyboard, a person who likes red."""
        await self.page.locator(f"{PANEL} .prompt").click()
        for _ in range(pairs):
            asked = (await self.json("/imagerefl/taste", name=name))["question"]["images"]
            red = [await self.redness(name, one["sha256"]) for one in asked]
            await self.press("ArrowLeft" if red[0] > red[1] else "ArrowRight", focus=False)

    async def state(self):
        return await self.page.evaluate(STATE)

    async def shot(self, name):
        """The node alone, large."""
        await self.page.evaluate(ALONE)
        await self.page.wait_for_timeout(2500)
        await self.page.evaluate("() => app.canvas.deselectAll()")
        await self.page.wait_for_timeout(1500)
        x, y, width, height = await self.page.evaluate(BOX)
        path, clip = screenshots / f"{name}.png", {"x": max(0, x - 12), "y": max(0, y - 12), "width": width + 24, "height": height + 24}
        await self.page.screenshot(path=path, clip=clip)
        Image.open(path).convert("RGB").save(path, optimize=True)


async def journey(tab, second):
    """What each step left: numbers of choices by outcome and of open questions, and what the panel says."""
    found = {}
    await tab.show()
    await tab.run()
    found["asked"] = await tab.state()
    await tab.page.mouse.click(40, 700)
    await tab.press("ArrowLeft", "s", "1", " ", focus=False)
    found["keys without focus"] = await tab.counts()
    await tab.show()
    await tab.press("ArrowLeft", "ArrowDown", "2")
    found["left, down, 2"] = await tab.counts()
    await tab.shot(f"taste-{look}-pairs")
    await tab.page.wait_for_timeout(2500)  # until the frontend has kept its graph
    await tab.page.reload(wait_until="domcontentloaded")
    await tab.ready()
    await tab.show()
    found["reloaded"] = await tab.state()
    await tab.press("z")
    found["undo"] = await tab.counts()
    await second.show()
    await second.page.locator(f"{PANEL} .images button").nth(1).click()
    await second.page.wait_for_timeout(1500)
    found["the other tab"] = [(await one.state())["said"] for one in (tab, second)]
    await asyncio.gather(*(one.page.locator(PANEL).evaluate(KEY, key) for one, key in ((tab, "1"), (second, "2"))))
    await tab.page.wait_for_timeout(1500)
    found["both at once"] = await tab.counts()
    found["said"] = sorted([(await one.state())["said"] for one in (tab, second)])
    await second.show("best", "best of n", 2)
    await second.run()
    await second.shot(f"taste-{look}-best")
    await second.press("3")
    await second.show("likes", "like or dislike", 3)
    await second.run()
    await second.shot(f"taste-{look}-likes")
    await second.press("ArrowRight", "ArrowLeft", "s")
    found["others"] = [await tab.counts("best"), await tab.counts("likes")]
    await second.page.locator(f"{PANEL} button", has_text="Delete").click()
    await second.page.locator("[role=dialog] button", has_text="Delete").last.click()
    await second.page.wait_for_timeout(1500)
    found["deleted"] = await tab.counts("likes")
    await tab.show("red", "pairs", 4, 40)
    await tab.run()
    await tab.choose_the_redder("red", 20)
    found["red"] = await tab.counts("red")
    found["saved with the graph"] = await second.page.evaluate("() => app.graph.serialize().nodes.at(-1).widgets_values")
    return found


async def main():
    screenshots.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    folder, port = work / "server", live.free_port()
    process, base, wrong = live.start(folder, port), f"http://127.0.0.1:{port}", []
    try:
        async with aiohttp.ClientSession() as session, async_playwright() as tools:
            await live.Client(session, base).ready(process, folder)
            switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
            browser = await tools.chromium.launch(executable_path=chromium, args=switches)
            context = await browser.new_context(viewport={"width": 1500, "height": 900})
            context.set_default_timeout(120_000)
            tabs = []
            for settings in ({"Comfy.Minimap.Visible": False, **({"Comfy.VueNodes.Enabled": True} if look == "vue" else {})}, {}):
                tab = Tab(await context.new_page(), base, session)
                tab.page.on("pageerror", lambda error: wrong.append(f"{error} {error.stack}"[:600]))
                await tab.page.goto(base, wait_until="domcontentloaded")
                await tab.ready()
                for key, value in settings.items():
                    await tab.page.evaluate("([key, value]) => app.extensionManager.setting.set(key, value)", [key, value])
                await tab.page.wait_for_timeout(1500)
                tabs.append(tab)
            await tabs[0].page.reload(wait_until="domcontentloaded")
            await tabs[0].ready()
            try:
                found = await journey(*tabs)
            except BaseException:
                await tabs[0].page.screenshot(path=screenshots / "failed.png")
                raise
        own = folder / "user" / "default" / "imagerefl_taste"
        shutil.copy(own / "taste" / "choices.jsonl", screenshots / "taste-choices.jsonl")
        shutil.copytree(own / "red", screenshots / f"taste-{look}-red", dirs_exist_ok=True)
        print(json.dumps({**found, "page errors": [error for error in wrong if "taste.js" in error]}))  # not the frontend's own
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(work)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main())
