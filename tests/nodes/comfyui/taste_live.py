"""A real ComfyUI server with the pack: its choices' routes are attacked, and two users choose. Works in the current folder.

Usage: taste_live.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import live
from PIL import Image

sys.path.insert(0, str(live.pack))
from trainer.taste.choices import save_image
from trainer.taste.questions import FOLDER, Questions

PROMPT = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
    "2": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
    "3": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
    "4": {"class_type": "PrimitiveString", "inputs": {"value": "a colour"}},
    "5": {
        "class_type": "ImageReFLTaste",
        "inputs": {"images": ["3", 0], "prompt": ["4", 0], "name": "taste", "ask": "pairs", "n": 4, "person": "", "save_metadata": False},
    },
}
RAW = ("/imagerefl/taste/../../../secret.txt", "/imagerefl/taste/%2e%2e/%2e%2e/user/secret.txt")
RAW += ("/api/imagerefl/taste/image?name=taste&sha256=%2e%2e%2f%00", "/api/imagerefl/taste/image?name=%2e%2e&sha256=x")


def listing(root, own):
    """Content by path of what lies outside the folder of choices and is not the server's own log or code."""
    paths = [
        path
        for path in root.rglob("*")
        if own not in (path, *path.parents) and "custom_nodes" not in path.parts and ".log" not in path.name
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


async def attack(client, folder, port):
    """Status by kind of attack, and what changed outside the folder."""
    own, base, codes = folder / "user" / "default" / FOLDER, f"{client.base}/api/imagerefl/taste", {}
    (folder / "secret.txt").write_text("secret")
    (folder / "user" / "secret.txt").write_text("secret")
    one = Questions(own / "taste")
    one.add([save_image(one.folder, Image.new("RGB", (8, 8), (60 * i, 0, 0))) for i in range(4)], "pair", "p")
    number, before = one.open()[0].id, listing(folder, own)

    async def post(kind, path, body, **more):
        sent = {"data": body} if isinstance(body, (str, bytes)) else {"json": body}
        async with client.session.post(f"{base}/{path}", **sent, **more) as answer:
            codes.setdefault(kind, set()).add(answer.status)

    async def posts(kind, name, **more):
        await post(kind, "choose", {"name": name, "id": number, "outcome": "skip"}, **more)
        await post(kind, "undo", {"name": name, "undoes": number}, **more)
        await post(kind, "delete", {"name": name, "confirm": name}, **more)

    for name in ("..", "../..", "%2e%2e", "%2e%2e%2f..", "/etc", "a\0", "x" * 999, "C:\\", "taste/../.."):
        await posts("names", name)
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        await posts("origins", "taste", headers=headers)
    await post("simple", "delete", '{"name": "taste", "confirm": "taste"}', headers={"Content-Type": "text/plain"})
    await post("huge", "choose", b" " * (8 << 20), headers={"Content-Type": "application/json"})
    for path in RAW:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        codes.setdefault("raw", set()).add(int((await reader.readline()).split()[1]))
        writer.close()
    image = next(one.folder.glob("images/*.png"))
    image.unlink()
    image.symlink_to(folder / "secret.txt")
    async with client.session.get(f"{base}/image", params={"name": "taste", "sha256": image.stem}) as answer:
        codes["link"] = {answer.status}
    (own / "linked").symlink_to(folder / "output")
    await posts("link", "linked")
    after = listing(folder, own)
    found = {
        "changed outside": [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)],
        "open": one.state()["open"],
    }
    await post("own address", "choose", {"name": "taste", "id": number, "outcome": "skip"}, headers={"Host": "a:1", "Origin": "http://a:1"})
    return {**found, "codes": {kind: sorted(statuses) for kind, statuses in codes.items()}}


async def two_users(client):
    """The answer to a tab of an unknown user, and the questions of each of two users after one of them queued."""
    users, found = [], {}
    for name in ("ann", "bob"):
        async with client.session.post(f"{client.base}/api/users", json={"username": name}) as answer:
            users.append(await answer.json())

    async def state(user, **query):
        headers = {"comfy-user": user} if user else {}
        async with client.session.get(f"{client.base}/api/imagerefl/taste", params={"name": "taste", **query}, headers=headers) as answer:
            return [answer.status, (await answer.json()).get("open")]

    listening = asyncio.create_task(client.listen())
    await asyncio.sleep(1)
    found["nobody"] = [await state(""), await state("../x")]
    found["unknown tab"] = (await client.run(PROMPT))["data"]["exception_message"].strip()
    await state(users[0], client=client.id)
    found["queued"] = (await client.run(PROMPT))["type"]
    found["open"] = [await state(user) for user in users]
    found["told"] = [event["data"] for event in client.seen if event["type"] == "imagerefl.taste"]
    listening.cancel()
    return found


async def visit(name, action, *flags):
    folder, port, start = Path(name).absolute(), live.free_port(), subprocess.Popen
    subprocess.Popen = lambda command, **more: start([*command, *flags], **more)
    process = live.start(folder, port)
    subprocess.Popen = start
    try:
        async with aiohttp.ClientSession() as session:
            client = live.Client(session, f"http://127.0.0.1:{port}")
            await client.ready(process, folder)
            return await action(client, folder, port)
    finally:
        process.terminate()
        process.wait(20)


async def main():
    attacked = await visit("attacked", attack, "--listen", "0.0.0.0")
    users = await visit("users", lambda client, *_: two_users(client), "--multi-user")
    print(json.dumps({"attacked": attacked, "users": users}))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main())
