"""Judges behind HTTP for the tests: the reference server in a thread, and servers that answer whatever a test wants."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer

import pytest

from tools import judge_server
from trainer.rewards import http_judge

ABOUT = {"protocol": 1, "name": "test", "version": "1"}


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """No test waits, or reads what another has cached."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(http_judge, "LIMITS", http_judge.Limits(retries=1, pause=0.001))
    monkeypatch.setattr(http_judge, "_KNOWN", {})


class Quiet(judge_server.Judge):
    """The reference server, without its log; `asked` counts the images of each request."""

    asked: list[int] = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        answer = self.answer
        self.answer = lambda status, content: (self.asked.append(len(content.get("scores", ()))), answer(status, content))
        super().do_POST()


@contextmanager
def reference():
    """The reference server: its URL, and how many images each request had."""
    kind = type("Judge", (Quiet,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind.asked
    finally:
        server.shutdown()
        server.server_close()


def reply(content, status="200 OK", kind="application/json", more=""):
    """An HTTP answer as bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@contextmanager
def raw(answer):
    """A server that sends what `answer(method, path, content, connection)` returns for each request, as it is; its URL and the requests."""
    listener, requests = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with suppress(OSError), connection, connection.makefile("rb") as file:  # the client may end it at any moment
            method, path, _ = (file.readline() or b"  ").decode().split(" ", 2)
            headers = {}
            while (line := file.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            content = file.read(int(headers.get("content-length", 0)))
            requests.append((method, path, headers, content))
            sent = answer(method, path, json.loads(content) if content else None, connection)
            if sent:
                connection.sendall(sent)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def judge_that(scored, about=ABOUT):
    """An `answer` of `raw`: health as usual, and for the rest what `scored(items)` returns: bytes, or the JSON beside the usual keys."""

    def answer(method, path, content, connection):
        if method == "GET":
            return reply(about)
        found = scored(content["items"])
        return found if isinstance(found, bytes) else reply(found if not isinstance(found, dict) else {**about, **found})

    return answer


def good(items):
    """Scores in order."""
    return {"scores": [{"id": item["id"], "score": number / 4} for number, item in enumerate(items)]}
