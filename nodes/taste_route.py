"""The routes by which a browser sees questions and answers them. They know ComfyUI only by the functions that they are given.

A request names a set of choices, never a path. One of another origin is refused, as is a POST that is not JSON, which a page of another
origin may send without asking.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from ..trainer.taste.questions import FOLDER, Questions, Stale, check_plain

BASE = "/imagerefl/taste"
LONGEST_BODY = 1 << 14
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PORTS = {"http": 80, "https": 443}
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Access:
    """What the routes ask of ComfyUI: the user of a request (KeyError: unknown), the user's folder, where to write temporary files, to
    tell all tabs that a set changed, to forget what was made of a set that was deleted, and to remember whose tab it is."""

    user_of: Callable[[web.Request], str]
    folder_of: Callable[[str], Path]
    temporary: Callable[[], Path]
    changed: Callable[[str], None]
    deleted: Callable[[str], None]
    seen: Callable[[str, str], None]


def questions_of(home: Path, name: str) -> Questions:
    """The set of a name in a user's folder. ValueError for names that could be paths, and for links."""
    if not _NAME.fullmatch(name):
        raise ValueError("name: give 1 to 64 letters, digits, _ and -")
    folder = home / FOLDER
    check_plain(folder)
    return Questions(folder / name)


def add_routes(routes: web.RouteTableDef, access: Access) -> None:
    """Register the routes."""
    for method, path, handler in (
        (routes.get, BASE, _state),
        (routes.get, f"{BASE}/image", _image),
        (routes.get, f"{BASE}/export", _export),
        (routes.post, f"{BASE}/choose", _choose),
        (routes.post, f"{BASE}/undo", _undo),
        (routes.post, f"{BASE}/delete", _delete),
    ):
        method(path)(_guarded(handler, access))


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _guarded(handler: Callable[[web.Request, Access], Awaitable[web.StreamResponse]], access: Access) -> Handler:
    """The handler, behind the checks; what it refuses is one line of JSON."""

    async def run(request: web.Request) -> web.StreamResponse:
        try:
            if _is_foreign(request):
                raise _Refused(403, "requests of other origins are refused")
            return await handler(request, access)
        except _Refused as error:
            return _said(str(error), error.status)
        except KeyError:
            return _said("unknown user", 403)
        except Stale as error:
            return _said(str(error), 409)
        except FileNotFoundError:
            return _said("no such image", 404)
        except ValueError as error:
            return _said(str(error), 400)
        except OSError as error:
            return _said(f"cannot read or write the choices: {error.strerror or error}", 500)

    return run


def _said(text: str, status: int) -> web.Response:
    answer = web.json_response({"error": text}, status=status, headers=_HEADERS)
    if status == 413:
        answer.force_close()  # the rest of the body is not read
    return answer


def _is_foreign(request: web.Request) -> bool:
    """Whether a page of another origin sent it. Browsers name the origin in POSTs; a proxy may name the host that it was asked for."""
    if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        return True
    origin = request.headers.get("Origin")
    if origin is None:
        return False
    asked = [request.headers.get(name, "") for name in ("Host", "X-Forwarded-Host")]
    try:
        parts = urlsplit(origin)
        own = [urlsplit(f"//{host}") for host in asked if host]
        port = parts.port or _PORTS.get(parts.scheme)
        return not any(parts.hostname and (parts.hostname, port) == (one.hostname, one.port or _PORTS.get(parts.scheme)) for one in own)
    except ValueError:
        return True


def _questions(request: web.Request, access: Access, name: Any) -> Questions:
    if not isinstance(name, str):
        raise ValueError("name: give a text")
    return questions_of(access.folder_of(access.user_of(request)), name)


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a POST; at most LONGEST_BODY bytes are read of it."""
    if request.content_type != "application/json":
        raise _Refused(415, "send Content-Type: application/json")
    data = b""
    while len(data) <= LONGEST_BODY and (request.content_length or 0) <= LONGEST_BODY:
        part = await request.content.read(LONGEST_BODY + 1 - len(data))
        if not part:
            break
        data += part
    else:
        raise _Refused(413, f"at most {LONGEST_BODY} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError("send one JSON object") from error
    if not isinstance(value, dict):
        raise ValueError("send one JSON object")
    return value


async def _apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """A call in another thread: the disk may be slow, and the server has one thread."""
    return await asyncio.get_running_loop().run_in_executor(None, call, *arguments)


async def _changed(one: Questions, access: Access) -> web.Response:
    access.changed(one.folder.name)
    return web.json_response(await _apart(one.state), headers=_HEADERS)


async def _state(request: web.Request, access: Access) -> web.StreamResponse:
    one = _questions(request, access, request.query.get("name"))
    client = request.query.get("client", "")
    if client:
        access.seen(client[:64], access.user_of(request))
    return web.json_response(await _apart(one.state), headers=_HEADERS)


async def _image(request: web.Request, access: Access) -> web.StreamResponse:
    one = _questions(request, access, request.query.get("name"))
    data = await _apart(one.image, request.query.get("sha256", ""))
    return web.Response(body=data, content_type="image/png", headers=_HEADERS)


async def _choose(request: web.Request, access: Access) -> web.StreamResponse:
    body = await _body(request)
    one, number, outcome, chosen = _questions(request, access, body.get("name")), body.get("id"), body.get("outcome"), body.get("chosen")
    if not isinstance(number, str) or not isinstance(outcome, str) or not (chosen is None or type(chosen) is int):
        raise ValueError("give the texts id and outcome, and chosen as a number or null")
    await _apart(one.answer, number, outcome, chosen)
    return await _changed(one, access)


async def _undo(request: web.Request, access: Access) -> web.StreamResponse:
    body = await _body(request)
    one, undoes = _questions(request, access, body.get("name")), body.get("undoes")
    if not isinstance(undoes, str):
        raise ValueError("undoes: give the id of the last choice")
    await _apart(one.undo, undoes)
    return await _changed(one, access)


async def _delete(request: web.Request, access: Access) -> web.StreamResponse:
    body = await _body(request)
    one = _questions(request, access, body.get("name"))
    if body.get("confirm") != body.get("name"):
        raise ValueError("confirm: give the name again")
    await _apart(one.delete)
    access.deleted(one.folder.name)
    return await _changed(one, access)


async def _export(request: web.Request, access: Access) -> web.StreamResponse:
    one = _questions(request, access, request.query.get("name"))
    access.temporary().mkdir(parents=True, exist_ok=True)
    descriptor, path = tempfile.mkstemp(".zip", "imagerefl_taste_", access.temporary())
    os.close(descriptor)
    try:
        await _apart(one.export, Path(path))
        disposition = {"Content-Disposition": f'attachment; filename="{one.folder.name}.zip"', "Content-Type": "application/zip"}
        answer = web.StreamResponse(headers={**_HEADERS, **disposition})
        answer.content_length = Path(path).stat().st_size
        await answer.prepare(request)
        with open(path, "rb") as file:
            while part := await _apart(file.read, 1 << 20):
                await answer.write(part)
        await answer.write_eof()
        return answer
    finally:
        Path(path).unlink(missing_ok=True)
