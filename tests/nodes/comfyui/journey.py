"""From training to a picked image in ComfyUI's own frontend, by its buttons: needs Chromium, and playwright from `.[comfy]`.

Usage: journey.py COMFYUI PACK SCREENSHOTS classic|vue. Prints one JSON line. Train, Cancel, resume, Save Reward LoRA; then Load Reward
LoRA with the run, Combined KSampler (auto), Reward Scorer, Pick Best, Save Image with Score. vue: Nodes 2.0.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import aiohttp
import live
from PIL import Image
from playwright.async_api import async_playwright

comfy_path, pack, screenshots = (Path(p).resolve() for p in sys.argv[1:4])
VIEW = {"width": 1900, "height": 1100}  # at less than 60 % the classic canvas draws no text
SET = """([kind, values]) => {
    for (const node of app.graph.nodes) if (node.type === kind) for (const widget of node.widgets ?? [])
        if (widget.name in values) { widget.value = values[widget.name]; widget.callback?.(widget.value) }
}"""
REPLACE = """run => {  // the plain sampler by Load Reward LoRA and Combined KSampler
    const plain = app.graph.nodes.find(node => node.type === 'KSampler'), [x, y] = plain.pos
    const from = name => app.graph.getLink(plain.inputs.find(i => i.name === name).link)
    const source = Object.fromEntries(['model', 'positive', 'negative', 'latent_image'].map(name => [name, from(name)]))
    const target = app.graph.getLink(plain.outputs[0].links[0])
    const add = (type, at, size) => {
        const node = LiteGraph.createNode(type); app.graph.add(node); node.pos = at; if (size) node.setSize(size); return node
    }
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name)
    const lora = add('ImageReFLLoadLora', [0, 180], [280, 120]), sampler = add('ImageReFLCombinedKSampler', [x, y], [300, 440])
    const link = (l, node, name) => app.graph.getNodeById(l.origin_id).connect(l.origin_slot, node, slot(node, name))
    link(source.model, lora, 'model'); link(source.model, sampler, 'base'); lora.connect(0, sampler, slot(sampler, 'tuned'))
    for (const name of ['positive', 'negative', 'latent_image']) link(source[name], sampler, name)
    sampler.connect(0, app.graph.getNodeById(target.target_id), target.target_slot)
    app.graph.remove(plain)
    for (const node of app.graph.nodes) if (node.pos[1] > 500) node.pos = [node.pos[0], node.pos[1] + 280]  // room for the preview
    const set = (node, name, value) => { const w = node.widgets.find(w => w.name === name); w.value = value; w.callback?.(value) }
    set(lora, 'lora_name', run); set(sampler, 'mode', 'auto'); set(sampler, 'steps', 20); set(sampler, 'cfg', 2.0)
}"""


class Browser:
    """A page of the frontend, and the server behind it."""

    def __init__(self, page, base, session, folder):
        self.page, self.base, self.session, self.folder = page, base, session, folder

    async def opened(self):
        await self.page.goto(self.base, wait_until="domcontentloaded")
        await self.page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.command")
        await self.page.wait_for_timeout(6000)
        await self.page.keyboard.press("Escape")  # the dialog of a first start
        await self.page.wait_for_timeout(1000)

    async def graph(self, name):
        workflow = json.loads((pack / "workflows" / f"{name}.json").read_text("utf-8"))
        await self.page.evaluate("([g, n]) => app.loadGraphData(g, true, true, n)", [workflow, name])
        await self.page.wait_for_timeout(2000)

    async def press(self, *labels):
        """Click the first visible button of one of these names, in the interface's own words."""
        for label in labels:
            for button in await self.page.get_by_role("button", name=label).all():
                if await button.is_visible() and await button.is_enabled():
                    await button.click()
                    return
        names = await self.page.eval_on_selector_all("button", "all => all.map(b => b.ariaLabel || b.innerText)")
        raise LookupError(f"no button {labels}: {names}")

    async def ended(self, number):
        """How the number-th prompt ended."""
        for _ in range(2400):
            async with self.session.get(self.base + "/history") as answer:
                entries = list((await answer.json()).values())
            if len(entries) >= number:
                return entries[number - 1]["status"]["messages"][-1][0]
            await asyncio.sleep(0.25)
        raise TimeoutError

    async def steps(self, name):
        """Steps that a run has logged."""
        path = self.folder / "output" / "imagerefl" / name / "log.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    async def shot(self, name):
        await self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        await self.page.wait_for_timeout(2500)
        path = screenshots / f"{name}.png"
        await self.page.screenshot(path=path)
        Image.open(path).convert("RGB").resize((1425, 825), Image.Resampling.LANCZOS).quantize(128).save(path, optimize=True)


async def journey(browser, look):
    found = {}
    await browser.graph("demo-train-imagerefl")
    small = {"train_steps": 12, "batch_size": 8, "name": "journey", "preview_every": 4}
    await browser.page.evaluate(SET, ["ImageReFLTrainLora", small])
    await browser.press("Run")
    while await browser.steps("journey") < 3:
        await asyncio.sleep(0.1)
    await browser.press("Cancel current run", "Cancel", "Interrupt", "Stop")
    found["cancel"] = await browser.ended(1)
    found["steps when cancelled"] = await browser.steps("journey")
    await browser.shot(f"journey-{look}-1-cancelled")

    await browser.page.evaluate(SET, ["ImageReFLTrainLora", {"resume": "the last run of this name"}])
    await browser.press("Run")
    found["resumed"] = await browser.ended(2)
    found["steps when resumed"] = await browser.steps("journey")
    found["saved LoRAs"] = len(list((browser.folder / "output" / "loras").glob("*.safetensors")))
    await browser.shot(f"journey-{look}-2-trained")
    await browser.press("Run")  # a graph queued again, as the browser changes it
    found["again"] = await browser.ended(3)
    found["steps after a second run"] = await browser.steps("journey")

    await browser.graph("demo-score-and-pick-best")
    await browser.page.evaluate("() => app.refreshComboInNodes()")  # the key R: the run joins the list of LoRAs
    await browser.page.wait_for_timeout(3000)
    await browser.page.evaluate(REPLACE, "run: journey")
    await browser.press("Run")
    found["used"] = await browser.ended(4)
    images = list((browser.folder / "output" / "ImageReFL").glob("best*.png"))
    found["saved with scores"] = sum(b"demo-proxy" in path.read_bytes() for path in images)
    await browser.shot(f"journey-{look}-3-used")
    return found


async def main():
    screenshots.mkdir(parents=True, exist_ok=True)
    work, look = Path(tempfile.mkdtemp()), sys.argv[4]
    folder, port = work / "server", live.free_port()
    process = live.start(folder, port)
    try:
        async with aiohttp.ClientSession() as session, async_playwright() as tools:
            await live.Client(session, f"http://127.0.0.1:{port}").ready(process, folder)
            switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
            page = await (await tools.chromium.launch(executable_path=chromium, args=switches)).new_page(viewport=VIEW)
            page.set_default_timeout(120_000)
            browser = Browser(page, f"http://127.0.0.1:{port}", session, folder)
            await browser.opened()
            await page.evaluate("() => app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
            if look == "vue":
                await page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
                await page.wait_for_timeout(1500)
                await browser.opened()
            print(json.dumps(await journey(browser, look)))
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(work)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main())
