"""The routes of the choices, attacked over real sockets: after each attempt the tree outside the user's folder is what it was."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import io
import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("aiohttp")
import aiohttp
from aiohttp import web

from trainer.taste.choices import read_choices, save_image
from trainer.taste.questions import FOLDER, Questions

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def route():
    """nodes/taste_route.py, which needs no ComfyUI, without the package around it, which does."""
    for name, folder in (("taste_pack", ROOT), ("taste_pack.nodes", ROOT / "nodes"), ("taste_pack.trainer", ROOT / "trainer")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    yield importlib.import_module("taste_pack.nodes.taste_route")
    for name in [name for name in sys.modules if name.split(".")[0] == "taste_pack"]:
        del sys.modules[name]


class Place:
    """A user folder with one set of two questions, files around it that nobody may read or change, and a server."""

    def __init__(self, route, root):
        self.route, self.root, self.user = route, root, root / "user" / "default"
        self.told, self.deleted, self.tabs = [], [], {}
        (root / "user" / "other" / FOLDER / "taste").mkdir(parents=True)
        (root / "temp").mkdir()
        for name in ("secret.txt", "user/secret.txt", "user/other/secret.txt", f"user/other/{FOLDER}/taste/choices.jsonl"):
            (root / name).write_text("secret", "utf-8")
        self.one = Questions(self.user / FOLDER / "taste")
        images = [save_image(self.one.folder, Image.new("RGB", (9, 7), (50 * i, 0, 0)), seed=i) for i in range(4)]
        self.one.add(images, "pair", "a cat")
        self.outside = self.listing()

    def listing(self):
        """Every file, folder and link outside the user's own folder of choices, with its content."""
        own = self.user / FOLDER
        paths = sorted(path for path in self.root.rglob("*") if path != own and own not in path.parents and path.parent.name != "temp")
        return [(str(p), p.is_symlink(), hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "") for p in paths]

    def user_of(self, request):
        user = request.headers.get("comfy-user", "default")
        if user not in ("default", "other"):
            raise KeyError(user)
        return user

    def use(self, visit):
        """Run `visit(session, base)` against the server as ComfyUI builds it."""

        async def run():
            app = web.Application(client_max_size=100 << 20)
            routes = web.RouteTableDef()
            access = self.route.Access(self.user_of, lambda user: self.root / "user" / user, lambda: self.root / "temp", *self.listeners())
            self.route.add_routes(routes, access)
            app.add_routes(routes)
            runner = web.AppRunner(app, lingering_time=0.1)  # seconds in which the rest of a refused body is thrown away
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            try:
                async with aiohttp.ClientSession() as session:
                    return await visit(session, f"http://127.0.0.1:{self.port}/imagerefl/taste")
            finally:
                await runner.cleanup()

        return asyncio.run(run())

    def listeners(self):
        return self.told.append, self.deleted.append, self.tabs.__setitem__

    def number(self):
        return self.one.state()["question"]["id"]


@pytest.fixture
def place(route, tmp_path):
    found = Place(route, tmp_path)
    yield found
    assert found.listing() == found.outside
    assert not [*(tmp_path / "temp").glob("*")]


async def answer(response):
    async with response as got:
        return got.status, await got.json()


def test_a_choice_an_undo_an_export_and_a_deletion(place):
    async def visit(session, base):
        state = (await answer(session.get(base, params={"name": "taste", "client": "tab"})))[1]
        question, first = state["question"], state["question"]["images"][0]
        async with session.get(f"{base}/image", params={"name": "taste", "sha256": first["sha256"]}) as got:
            assert got.content_type == "image/png" and Image.open(io.BytesIO(await got.read())).size == (9, 7)
        said = {"name": "taste", "id": question["id"], "outcome": "chosen", "chosen": first["index"]}
        status, after = await answer(session.post(f"{base}/choose", json=said))
        assert status == 200 and after["counts"] == {"chosen": 1} and after["last"] == question["id"] and after["open"] == 1
        assert await answer(session.post(f"{base}/choose", json=said)) == (409, {"error": "that question was answered in another tab"})
        async with session.get(f"{base}/export", params={"name": "taste"}) as got:
            names = zipfile.ZipFile(io.BytesIO(await got.read())).namelist()
        assert len(names) == 3 and names[0] == "choices.jsonl" and "taste.zip" in got.headers["Content-Disposition"]
        status, after = await answer(session.post(f"{base}/undo", json={"name": "taste", "undoes": question["id"]}))
        assert (status, after["open"], after["counts"]) == (200, 2, {})
        assert (await answer(session.post(f"{base}/delete", json={"name": "taste", "confirm": "x"})))[0] == 400
        status, after = await answer(session.post(f"{base}/delete", json={"name": "taste", "confirm": "taste"}))
        assert (status, after["open"]) == (200, 0) and not place.one.folder.exists()

    place.use(visit)
    assert place.told == ["taste"] * 3 and place.deleted == ["taste"] and place.tabs == {"tab": "default"}


NAMES = ["..", "../other", "%2e%2e", "%2e%2e%2fother", "..%2fother", "/etc", "C:\\x", "a/b", "a\\b", "", ".", "a\0b", "a%00", "ä", "x" * 65]
NAMES += ["taste\n", " taste", "taste.", "~", "taste/../../other", "....//other"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_paths_are_refused(place, name):
    async def visit(session, base):
        number = place.number()
        found = [await answer(session.get(base, params={"name": name})), await answer(session.get(f"{base}/export", params={"name": name}))]
        found.append(await answer(session.get(f"{base}/image", params={"name": name, "sha256": "0" * 64})))
        for path, rest in (("choose", {"id": number, "outcome": "skip", "chosen": None}), ("undo", {"undoes": number})):
            found.append(await answer(session.post(f"{base}/{path}", json={"name": name, **rest})))
        found.append(await answer(session.post(f"{base}/delete", json={"name": name, "confirm": name})))
        return found

    assert place.use(visit) == [(400, {"error": "name: give 1 to 64 letters, digits, _ and -"})] * 6
    assert place.one.state()["open"] == 2


def raw(place, *requests):
    """Bytes sent as they are, one connection each -> the status lines."""

    async def visit(_, base):
        found = []
        for request in requests:
            reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
            writer.write(request)
            await writer.drain()
            found.append(int((await asyncio.wait_for(reader.readline(), 10)).split()[1]))
            writer.close()
        return found

    return place.use(visit)


def test_paths_that_no_client_would_send(place):
    paths = [
        "/../../secret.txt",
        "/image/../../../user/secret.txt",
        "/%2e%2e/%2e%2e/secret.txt",
        "/image?name=taste&sha256=../../../../secret.txt",
    ]
    paths += ["/image?name=taste&sha256=%2e%2e%2f%2e%2e%2fsecret", "/image?name=taste&sha256=%00", "/image?name=%2e%2e%2fother&sha256=a"]
    paths += ["//etc/passwd", "/image?name=taste&name=../other&sha256=" + "0" * 64]
    found = raw(place, *(f"GET /imagerefl/taste{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths))
    assert set(found) <= {400, 404}, dict(zip(paths, found))


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:{port}"},
    {"Origin": "http://127.0.0.1.evil.example:{port}"},
    {"Origin": "http://user@evil.example:{port}"},
    {"Origin": "http://[::1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:{port}"},
]
OWN = [
    {},
    {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    {"Origin": "http://box.local:8188", "Host": "box.local:8188"},
    {"Origin": "https://box.example", "Host": "box.example"},
    {"Origin": "https://box.example", "Host": "box.example:443"},
    {"Origin": "https://box.example", "Host": "127.0.0.1:8188", "X-Forwarded-Host": "box.example"},
    {"Origin": "http://[::1]:8188", "Host": "[::1]:8188"},
    {"Origin": "http://192.168.0.7:8188", "Host": "192.168.0.7:8188"},
]


@pytest.mark.parametrize(("headers", "status"), [*((one, 403) for one in FOREIGN), *((one, 200) for one in OWN)])
def test_other_origins_are_refused_and_other_addresses_are_not(place, headers, status):
    async def visit(session, base):
        sent = {key: value.format(port=place.port) for key, value in headers.items()}
        body = {"name": "taste", "id": place.number(), "outcome": "skip", "chosen": None}
        asked = await answer(session.get(base, params={"name": "taste"}, headers=sent))
        return asked[0], (await answer(session.post(f"{base}/choose", json=body, headers=sent)))[0]

    assert place.use(visit) == (status, status)
    assert place.one.state()["counts"] == ({} if status == 403 else {"skip": 1})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_posts_that_a_page_may_send_without_asking_are_refused(place, kind):
    async def visit(session, base):
        data = json.dumps({"name": "taste", "confirm": "taste"}).encode()
        return await answer(session.post(f"{base}/delete", data=data, headers={"Content-Type": kind}))

    assert place.use(visit)[0] == 415 and place.one.state()["open"] == 2


def test_huge_bodies_are_not_read(place):
    sent = []

    async def endless():
        for _ in range(1 << 12):
            sent.append(1)
            yield b" " * (1 << 14)

    async def visit(session, base):
        headers = {"Content-Type": "application/json"}
        found = [(await answer(session.post(f"{base}/choose", data=b" " * (1 << 22), headers=headers)))[0]]
        try:
            found.append((await answer(session.post(f"{base}/choose", data=endless(), headers=headers)))[0])
        except aiohttp.ClientError:  # the connection was closed while it was still being sent
            found.append(413)
        return found

    assert place.use(visit) == [413, 413] and len(sent) < 1 << 12
    head = b"POST /imagerefl/taste/choose HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    assert raw(place, head % (1 << 40)) == [413]


BODIES = ["", "[]", "1", "null", "{", "[" * 9000, '{"name": 3}', '{"name": ["taste"]}', '{"name": "taste"}', "9" * 9000, "\xff", "{}"]
BODIES += ['{"name": "taste", "id": 1, "outcome": "skip"}', '{"name": "taste", "id": "x", "outcome": ["skip"]}']
BODIES += [
    '{"name": "taste", "id": "ID", "outcome": "chosen", "chosen": true}',
    '{"name": "taste", "id": "ID", "outcome": "chosen", "chosen": -1}',
]
BODIES += ['{"name": "taste", "id": "ID", "outcome": "chosen", "chosen": 1e9}', '{"name": "taste", "id": "ID", "outcome": "liked"}']
BODIES += ['{"name": "taste", "id": "ID", "outcome": "chosen", "chosen": "../0"}']


def test_bodies_that_are_no_choice_are_refused(place):
    async def visit(session, base):
        number, found = place.number(), []
        for text in BODIES:
            data = text.replace("ID", number).encode("latin-1")
            for path in ("choose", "undo", "delete"):
                response = session.post(f"{base}/{path}", data=data, headers={"Content-Type": "application/json"})
                found.append((await answer(response))[0])
        return found

    assert set(place.use(visit)) <= {400, 409}
    assert place.one.state()["open"] == 2 and not place.one.path.exists()


@pytest.mark.parametrize("name", ["choices.jsonl", "open.jsonl", "waiting.jsonl", "images", ".", ".."])
def test_links_in_the_folder_are_not_followed(place, name):
    path = {".": place.one.folder, "..": place.one.folder.parent}.get(name, place.one.folder / name)
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    target = place.root / "user" / "other" / FOLDER / "taste"
    path.symlink_to({".jsonl": target / "choices.jsonl", "": target.parent if name == ".." else target}[path.suffix])

    async def visit(session, base):
        found = [
            await answer(session.get(base, params={"name": "taste"})),
            await answer(session.get(f"{base}/export", params={"name": "taste"})),
        ]
        for route, rest in (("choose", {"id": "x", "outcome": "skip"}), ("undo", {"undoes": "x"}), ("delete", {"confirm": "taste"})):
            found.append(await answer(session.post(f"{base}/{route}", json={"name": "taste", **rest})))
        return found

    assert {status for status, _ in place.use(visit)} == {400}


def test_images_that_are_links_are_not_read_and_deleting_removes_the_link_alone(place):
    (image,) = [path for path in place.one.folder.glob("images/*.png")][:1]
    image.unlink()
    image.symlink_to(place.root / "secret.txt")

    async def visit(session, base):
        asked = await answer(session.get(f"{base}/image", params={"name": "taste", "sha256": image.stem}))
        deleted = await answer(session.post(f"{base}/delete", json={"name": "taste", "confirm": "taste"}))
        return asked[0], deleted[0]

    assert place.use(visit) == (400, 200) and not place.one.folder.exists()


def test_users_see_their_own_choices(place):
    async def visit(session, base):
        found = [
            await answer(session.get(base, params={"name": "mine"}, headers={"comfy-user": user})) for user in ("other", "../x", "nobody")
        ]
        return [status for status, _ in found]

    assert place.use(visit) == [200, 403, 403]


def test_two_tabs_at_once_are_counted_once(place):
    async def visit(session, base):
        body = {"name": "taste", "id": place.number(), "outcome": "chosen"}
        both = [answer(session.post(f"{base}/choose", json={**body, "chosen": side % 2})) for side in range(12)]
        return sorted(status for status, _ in await asyncio.gather(*both))

    assert place.use(visit) == [200] + [409] * 11
    assert len(read_choices(place.one.path).records) == 1
