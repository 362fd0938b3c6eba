"""Open every workflow of the pack in ComfyUI's own frontend, queue it, and look: needs Chromium, and playwright from `.[comfy]`.

Usage: browser.py COMFYUI PACK SCREENSHOTS [NAME ...]. Prints one JSON line. SD1.5 workflows run on a tiny checkpoint under the
file name that they ask for, at 64×64 and few steps; SDXL is opened, not run.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import live
from playwright.async_api import async_playwright

comfy_path, pack, screenshots = (Path(p).resolve() for p in sys.argv[1:4])
only = sys.argv[4:]
SMALL = {"width": 64, "height": 64, "batch_size": 1, "image_size": 64, "sampler_steps": 4, "preview_every": 1}
SMALL |= {"grad_accumulation_steps": 1, "train_steps": 2}
STEPS = {"KSampler": 4, "ImageReFLCombinedKSampler": 4}


def models(folder):
    """The files that the SD1.5 workflows ask for."""
    for name in ("checkpoints", "loras"):
        (folder / name).mkdir(parents=True)
    first = folder / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"
    command = [sys.executable, Path(__file__).parent / "tiny.py", comfy_path, pack, first, folder / "loras" / "imagerefl-sd15.safetensors"]
    subprocess.run([str(c) for c in command], check=True, cwd=folder, capture_output=True)
    os.link(first, folder / "checkpoints" / "imagerefl-sd15-merged.safetensors")


async def choose_template(page, name):
    """Through the template browser, as a user: the pack's entry in the list, then the card."""
    await page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    await page.wait_for_timeout(3000)
    await page.get_by_text("comfyui-imagerefl", exact=True).first.click(timeout=60_000)
    card = page.get_by_text(name, exact=True).first
    await card.wait_for(timeout=60_000)
    await page.wait_for_timeout(500)
    if not (screenshots / "templates.png").exists():
        await page.screenshot(path=screenshots / "templates.png")
    await card.click()
    await page.wait_for_function(
        "name => app.graph.nodes.length > 3 && !document.querySelector('.p-dialog-mask')", arg=name, timeout=60_000
    )


async def shrink(page):
    """Fewer steps and pixels for a processor; which nodes and links there are stays as it is."""
    return await page.evaluate(
        """([small, steps]) => {
            for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
                if (widget.name in small && node.type !== 'SaveImage') widget.value = small[widget.name]
                if (widget.name === 'steps' && node.type in steps) widget.value = steps[node.type]
                if (node.type === 'ImageReFLLoadReward') {  // the one whose weights are here
                    widget.value = 'demo-proxy'
                    node.inputs?.forEach((input, slot) => { if (input.link != null) node.disconnectInput(slot) })
                }
                if (widget.name === 'mode') { widget.value = 'fraction' }
                if (widget.name === 'switch_at') widget.value = 0.5
            }
        }""",
        [SMALL, STEPS],
    )


async def look(page, base, name):
    workflow = json.loads((pack / "workflows" / f"{name}.json").read_text("utf-8"))
    await choose_template(page, name)
    state = await page.evaluate(
        """() => ({nodes: app.graph.nodes.length, links: [...(app.graph.links.values?.() ?? Object.values(app.graph.links))].length,
                   missing: app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)})"""
    )
    found = {
        "missing": state["missing"],
        "all nodes and links": state["nodes"] == len(workflow["nodes"]) and state["links"] == len(workflow["links"]),
    }
    if name.startswith("sdxl"):
        await page.screenshot(path=screenshots / f"{name}.png")
        return found
    if name.startswith("sd15"):
        await shrink(page)
    await page.evaluate("() => app.queuePrompt(0)")
    for _ in range(3000):
        async with aiohttp.ClientSession() as session, session.get(base + "/history") as answer:
            history = await answer.json()
        if history and all(entry["status"]["completed"] or entry["status"]["status_str"] == "error" for entry in history.values()):
            break
        await asyncio.sleep(0.2)
    found["ran"] = [entry["status"]["status_str"] for entry in history.values()]
    await page.wait_for_timeout(1500)
    await page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    await page.wait_for_timeout(1500)
    found["images shown"] = await page.evaluate("() => app.graph.nodes.filter(n => n.imgs?.length).length")
    await page.screenshot(path=screenshots / f"{name}.png")
    async with aiohttp.ClientSession() as session, session.post(base + "/history", json={"clear": True}):
        pass
    return found


async def main():
    screenshots.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    folder, port = work / "server", live.free_port()
    models(work / "models")
    process = live.start(folder, port, work / "models")
    shutil.copy(comfy_path / "input" / "example.png", folder / "input" / "example.png")
    base = f"http://127.0.0.1:{port}"
    results = {}
    try:
        async with aiohttp.ClientSession() as session:
            await live.Client(session, base).ready(process, folder)
        async with async_playwright() as tools:
            switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = await tools.chromium.launch(executable_path=chromium, args=switches)
            page = await browser.new_page(viewport={"width": 1800, "height": 1100})
            page.set_default_timeout(120_000)
            await page.goto(base, wait_until="domcontentloaded")
            await page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.command")
            await page.wait_for_timeout(8000)
            await page.keyboard.press("Escape")  # the dialog of a first start
            await page.wait_for_timeout(1500)
            for path in sorted((pack / "workflows").glob("*.json")):
                if not only or path.stem in only:
                    results[path.stem] = await look(page, base, path.stem)
            await browser.close()
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(work)
    print(json.dumps(results))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main())
