"""The HTTP judge: scores as the server gave them, and every way in which a server may misbehave refused in one line."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.judges import ABOUT, apart, good, judge_that, raw, reference, reply  # noqa: F401
from PIL import Image

from tools import judge_server
from trainer.__main__ import main
from trainer.data import images
from trainer.reward import RewardUnavailable
from trainer.rewards.http_judge import Capabilities, HttpJudge, Limits, folder_of
from trainer.rewards.judge_client import MOST_BYTES, Endpoint
from trainer.rewards.registry import load, load_reward, weights_hashes

ROOT = Path(__file__).parents[2]


def noise(n, size=(5, 7), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def open_judge(url, **limits):
    return HttpJudge.connect(url, limits=Limits(**{"seconds": 5.0, "retries": 1, "pause": 0.001, **limits}))


# -- where it may be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "port", "local"),
    [
        ("http://127.0.0.1:8077", 8077, True),
        ("http://localhost:8077/hpsv3/", 8077, True),
        ("http://LOCALHOST", 80, True),
        ("http://[::1]:9", 9, True),
        ("http://127.9.9.9:9/a.b/c-d", 9, True),
        ("https://judge.example.com", 443, False),
        ("http://192.168.1.5:9", 9, False),
    ],
)
def test_a_url_is_of_this_machine_or_not(url, port, local):
    found = Endpoint.parse(url, allow_remote=not local)
    assert (found.port, found.local) == (port, local)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost.evil.com:8077",
        "http://evil.com#localhost",
        "http://127.0.0.1.evil.com",
        "http://2130706433:80",
        "http://127.1:80",
        "http://0x7f000001",
        "http://[::ffff:8.8.8.8]:80",
        "http://10.0.0.1",
        "http://localhost.:80",
        "http://xn--localhost-x",
    ],
)
def test_what_only_looks_like_this_machine_is_refused(url):
    with pytest.raises(RewardUnavailable, match=r"is not this machine.*--allow-remote|plain path|not the URL"):
        Endpoint.parse(url, allow_remote=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://0.0.0.0:80",
        "http://[::]:80",
        "http://localhost@evil.com",
        "http://user:secret@localhost",
        "http://localhost:99999",
        "http://localhost:0",
        "http://localhost:x",
        "http://",
        "http://[::1",
        "http://local host",
        "http://localhost\t.evil.com",
        "http://localhost\n",
        "http://localhost/a/../b",
        "http://localhost/?a=1",
        "http://localhost/%2e",
        "http://localhost\\@evil.com",
        "http://lokälhost",
        "ftp://localhost",
        "file:///etc/passwd",
    ],
)
def test_urls_that_are_not_plain_are_refused_even_where_remote_ones_are_allowed(url):
    with pytest.raises(RewardUnavailable, match="the form is http://127.0.0.1:PORT") as caught:
        Endpoint.parse(url, allow_remote=True)
    assert "\n" not in str(caught.value)


def test_no_proxy_of_the_environment_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{elsewhere.getsockname()[1]}")
        with reference() as (url, _):
            assert open_judge(url).capabilities.name == "brightness"
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_a_redirect_is_not_followed():
    with raw(lambda *_: reply(b"", "200 OK")) as (elsewhere, asked):
        answer = reply(b"", "302 Found", more=f"Location: {elsewhere}/health\r\n")
        with raw(lambda *_: answer) as (url, _), pytest.raises(RewardUnavailable, match="HTTP 302.*redirects are not followed"):
            open_judge(url)
    assert asked == []


def test_localhost_is_asked_where_it_listens_and_never_looked_up(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", None)
    looked_up, found = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: (looked_up.append(host), found(host, *rest, **more))[1])
    with reference() as (url, _):
        assert open_judge(url.replace("127.0.0.1", "localhost")).capabilities.name == "brightness"
    assert looked_up == ["127.0.0.1"]


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_the_servers_and_the_images_arrive_bit_by_bit():
    with reference() as (url, asked):
        judge = open_judge(url)
        pixels = noise(20)
        scores = judge(pixels, ["unread"] * 20)
    expected = judge_server.score([images.to_pil(image) for image in pixels], [])
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-7)
    assert asked == [16, 4] and not judge.needs_prompt and not judge.differentiable and judge.external


def test_an_exchange_is_what_the_protocol_says():
    """The recorded exchange that docs/judges.md shows: a change of the bytes that are sent is a new protocol."""
    record = json.loads((ROOT / "tests" / "data" / "judge_exchange.json").read_text("utf-8"))

    def answer(method, path, content, connection):
        return reply(record["health"] if method == "GET" else record["answer"])

    with raw(answer) as (url, requests):
        judge = open_judge(url + "/red")
        image = torch.tensor([[255, 0], [10, 20]]).float().expand(3, 2, 2)[None] / 255
        score = judge(image, ["a red fox"])
    (get, place, headers, _), (post, there, sent_headers, content) = requests
    assert (get, place, post, there) == ("GET", "/red/health", "POST", "/red/score")
    assert headers["host"] == url.removeprefix("http://") and sent_headers["content-type"] == "application/json"
    sent = json.loads(content)
    (item,) = sent["items"]
    pixels = Image.open(io.BytesIO(base64.b64decode(item.pop("image"))))
    assert (pixels.format, pixels.mode, pixels.tobytes()) == ("PNG", "RGB", bytes(v for v in (255, 0, 10, 20) for _ in range(3)))
    assert sent == record["request"]
    assert float(score) == pytest.approx(record["answer"]["scores"][0]["score"]) and judge.statistics == (0.5, 0.25)


def test_known_images_are_not_sent_again_and_each_only_once():
    with reference() as (url, asked):
        judge = open_judge(url)
        first = judge(noise(3), ["a", "b", "c"])
        again = load(url).reward  # another process, as it were
        both = again(torch.cat([noise(3), noise(2, seed=1), noise(2, seed=1)]), ["x"] * 7)  # this judge reads no prompt
        assert asked == [3, 2]
    assert torch.equal(both[:3], first) and torch.equal(both[3:5], both[5:])


def test_the_prompt_and_the_size_are_part_of_what_is_known():
    with raw(judge_that(good)) as (url, requests):
        judge = open_judge(url)
        judge(torch.zeros(1, 3, 2, 8), ["a"])
        judge(torch.zeros(1, 3, 2, 8), ["b"])
        judge(torch.zeros(1, 3, 4, 4), ["b"])
        judge(torch.zeros(1, 3, 4, 4), ["b"])
        assert len(requests) == 1 + 3


def test_scores_of_another_version_are_not_taken_for_this_ones(caplog):
    about = {**ABOUT}
    with raw(judge_that(good, about)) as (url, requests):
        one = open_judge(url)
        one(noise(1), ["a"])
        hashes = weights_hashes(url)
        about["version"] = "2"
        with pytest.raises(RewardUnavailable, match="test 2 answers, and test 1 was asked"):
            one(noise(1, seed=1), ["a"])
        two = open_judge(url)
        two(noise(1), ["a"])
        assert len(requests) == 5 and weights_hashes(url) != hashes and one.cache.path != two.cache.path


def test_a_cache_that_cannot_be_read_stops_nothing_and_is_said(caplog):
    with reference() as (url, asked):
        judge = open_judge(url)
        judge.cache.path.parent.mkdir(parents=True)
        judge.cache.path.write_bytes(b"this is not a database" * 100)
        with caplog.at_level(logging.WARNING):
            first, second = judge(noise(2), [""] * 2), judge(noise(2), [""] * 2)
    assert torch.equal(first, second) and asked == [2, 2]
    assert [str(judge.cache.path) in line.message and "delete that file" in line.message for line in caplog.records] == [True]


def test_batches_that_were_scored_are_kept_when_a_later_one_fails():
    left = [1]

    def scored(items):
        left[0] -= 1
        return good(items) if left[0] >= 0 else reply({"error": "out of\nmemory"}, "500 Oh")

    with raw(judge_that(scored, {**ABOUT, "max_batch": 2})) as (url, requests):
        judge = open_judge(url)
        with pytest.raises(RewardUnavailable, match=r"asked 2 times and gave no answer: HTTP 500 \(out of memory\)"):
            judge(noise(4), [""] * 4)
        left[0] = 1
        assert judge(noise(4), [""] * 4).tolist() == [0, 0.25, 0, 0.25]
    assert [len(json.loads(content)["items"]) for *_, content in requests[1:]] == [2, 2, 2, 2]


def test_images_without_numbers_are_not_sent():
    with raw(judge_that(good)) as (url, requests):
        with pytest.raises(ValueError, match="not finite"):
            open_judge(url)(torch.full((1, 3, 2, 2), torch.nan), ["a"])
        assert len(requests) == 1


# -- servers that misbehave ------------------------------------------------------------------------------------------


def changed(change):
    return lambda items: {"scores": [{"id": item["id"], **change} for item in items]}


BAD = {
    "too few": (lambda items: {"scores": good(items)["scores"][1:]}, "2 scores for 3 images"),
    "too many": (lambda items: {"scores": [*good(items)["scores"], {"id": "x", "score": 1}]}, "4 scores for 3 images"),
    "another order": (lambda items: {"scores": good(items)["scores"][::-1]}, "in another order"),
    "other images": (changed({"id": "0" * 64, "score": 1}), "of another image"),
    "no ids": (lambda items: {"scores": [{"score": 1}] * 3}, "of another image"),
    "one twice": (lambda items: {"scores": [good(items)["scores"][0]] * 3}, "of another image"),
    "bare numbers": (lambda items: {"scores": [1, 2, 3]}, "not a list of objects"),
    "no scores": (lambda items: {}, "not a list of objects"),
    "text": (changed({"score": "0.5"}), "'0.5', not a finite number"),
    "true": (changed({"score": True}), "True, not a finite number"),
    "null": (changed({"score": None}), "None, not a finite number"),
    "a list": (changed({"score": [1]}), r"\[1\], not a finite number"),
    "NaN": (lambda items: reply(json.dumps({**ABOUT, **changed({"score": float("nan")})(items)}).encode()), "not JSON: NaN"),
    "infinite": (lambda items: reply(json.dumps({**ABOUT, **changed({"score": float("inf")})(items)}).encode()), "not JSON: Infinity"),
    "1e999": (lambda items: reply(json.dumps({**ABOUT, **good(items)}).encode().replace(b"0.25", b"1e999")), "inf, not a finite number"),
    "beyond float32": (changed({"score": 1e39}), r"1e\+39, not a finite number"),
    "a huge integer": (lambda items: {"scores": [{"id": i["id"], "score": 10**300} for i in items]}, "not a finite number"),
    "another judge": (lambda items: {**good(items), "name": "other\n\x1b[31m"}, r"other \[31m 1 answers, and test 1 was asked"),
    "another protocol": (lambda items: {**good(items), "protocol": 2}, "protocol 2, and this version speaks 1"),
    "no version": (lambda items: {**good(items), "version": None}, "test None answers"),
    "a list of JSON": (lambda items: [1], "not a JSON object"),
    "a web page": (lambda items: reply(b"<html>Welcome</html>", kind="text/html"), "text/html that is not JSON"),
    "not found": (lambda items: reply(b"<html>no</html>", "404 Not Found", "text/html"), r"HTTP 404 \(text/html\)"),
    "refused": (lambda items: reply({"error": "bad \r\n image"}, "400 Bad"), r"HTTP 400 \(bad image\)"),
    "deep": (lambda items: reply(b"[" * 200_000), "not JSON"),
    "not UTF-8": (lambda items: reply(b'{"a": "\xff"}'), "not JSON"),
    "too long": (lambda items: reply(b" " * (MOST_BYTES + 1)), "more than 1 MB"),
    "cut off": (lambda items: reply({**ABOUT, **good(items)})[:-9], "asked 2 times.*the answer was cut off"),
    "nothing": (lambda items: b"", "asked 2 times.*without response"),
    "not HTTP": (lambda items: b"SSH-2.0-OpenSSH_9\r\n", "asked 2 times"),
    "a long error": (lambda items: reply({"error": "x" * 9999}, "503 Busy"), "asked 2 times.*HTTP 503.{1,220}start it"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_refused_in_one_line_and_not_kept(kind):
    answer, message = BAD[kind]
    with raw(judge_that(answer)) as (url, requests):
        judge = open_judge(url)
        with pytest.raises(RewardUnavailable, match=message) as caught:
            judge(noise(3), ["a", "b", "c"])
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 500
        assert url in str(caught.value) and judge.cache.read(["x"]) == {} and len(requests) <= 3


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ([], "not a JSON object"),
        ({"name": "a", "version": "1"}, "protocol None"),
        ({**ABOUT, "protocol": True}, "protocol True"),
        ({**ABOUT, "name": ""}, "name is not a short text"),
        ({**ABOUT, "version": 3}, "version is not a short text"),
        ({**ABOUT, "version": "a\nb"}, "version is not a short text"),
        ({**ABOUT, "needs_prompt": "yes"}, "neither true nor false"),
        ({**ABOUT, "max_batch": 0}, "max_batch"),
        ({**ABOUT, "max_batch": True}, "max_batch"),
        ({**ABOUT, "seconds": -1}, "seconds"),
        ({**ABOUT, "mean": 1}, "it has no std"),
        ({**ABOUT, "mean": 1, "std": 0}, "std is 0"),
    ],
)
def test_what_a_judge_says_of_itself_is_checked(about, message):
    with pytest.raises(RewardUnavailable, match=message):
        Capabilities.parse(about, "http://localhost")


def test_what_a_judge_asks_for_is_limited():
    found = Capabilities.parse({**ABOUT, "max_batch": 10**9, "seconds": 10**400}, "http://localhost")
    assert (found.batch, found.seconds) == (256, 600)


def test_a_server_that_answers_drop_by_drop_is_late():
    def dripping(method, path, content, connection):
        if method == "GET":
            return reply(ABOUT)
        for letter in b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX: " + b"x" * 500:
            connection.sendall(bytes([letter]))
            time.sleep(0.005)
        return b""

    with raw(dripping) as (url, requests):
        judge, begin = open_judge(url, seconds=0.05), time.monotonic()
        with pytest.raises(RewardUnavailable, match="asked 2 times and gave no answer: no answer within 0.05 s"):
            judge(noise(1), ["a"])
        assert time.monotonic() - begin < 1 and len(requests) == 3


@pytest.mark.parametrize("scheme", ["http", "https"])  # while it connects, and while it agrees on a cipher
def test_no_thread_outlives_a_server_that_never_answers(scheme):
    before, full = set(threading.enumerate()), []
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        for _ in range(3 if scheme == "http" else 0):  # the queue of connections is full: the next one waits
            full.append(socket.socket())
            full[-1].setblocking(False)
            full[-1].connect_ex(("127.0.0.1", port))
        with pytest.raises(RewardUnavailable, match=r"no answer within 0\.2 s"):
            Endpoint.parse(f"{scheme}://127.0.0.1:{port}", False).ask("/health", None, 0.2, 0, 0.0, lambda: None)
        end = time.monotonic() + 2
        while set(threading.enumerate()) - before and time.monotonic() < end:
            time.sleep(0.01)
        assert not set(threading.enumerate()) - before
    for one in full:
        one.close()


def test_cancel_ends_the_wait_at_once():
    class Cancelled(Exception):
        pass

    def silent(method, path, content, connection):
        if method == "GET":
            return reply(ABOUT)
        asked.append(1)
        connection.recv(1)
        return b""

    def waiting():
        if asked:
            raise Cancelled

    asked = []
    with raw(silent) as (url, _):
        judge = HttpJudge.connect(url, limits=Limits(60.0), waiting=waiting)
        begin = time.monotonic()
        with pytest.raises(Cancelled):
            judge(noise(1), ["a"])
        assert time.monotonic() - begin < 1


def test_a_server_that_comes_back_is_asked_again():
    answers = [reply({"error": "loading"}, "503 Busy"), b"", None]

    def scored(items):
        found = answers.pop(0)
        return good(items) if found is None else found

    with raw(judge_that(scored)) as (url, requests):
        assert open_judge(url, retries=2)(noise(2), ["a", "b"]).tolist() == [0, 0.25]
        assert len(requests) == 4


# -- commands --------------------------------------------------------------------------------------------------------


def test_nobody_there_is_one_line(image_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["score", str(image_folder), "--reward", f"http://127.0.0.1:{port}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(r"asked 2 times and gave no answer: .*[Cc]onnection refused; start it", error)


def test_score_and_calibrate_by_a_judge(image_folder, tmp_path, capsys):
    with reference() as (url, _):
        assert main(["score", str(image_folder), "--reward", url, "--out", str(tmp_path / "s.csv")]) == 0
        with open(tmp_path / "s.csv") as file:
            rows = list(csv.DictReader(file))
        expected = judge_server.score([Image.open(row["path"]) for row in rows], [])
        assert [float(row[url]) for row in rows] == pytest.approx(expected, abs=1e-6)
        assert main(["rewards", "calibrate", url, str(image_folder)]) == 0
        spec = load(url)
        mean, std = torch.tensor(expected).mean(), torch.tensor(expected).std()
        assert (spec.mean, spec.std) == pytest.approx((float(mean), float(std)), rel=1e-4)
        sum_of = load_reward(f"{url}=2, demo-proxy", standardise=True)
        assert sum_of.external and not sum_of.differentiable
        assert (folder_of(url, spec.reward.capabilities) / "statistics.json").is_file()


def test_scoring_goes_on_where_a_judge_was_lost(image_folder, tmp_path, capsys):
    left, scored = [2], []

    def scoring(items):
        left[0] -= 1
        if left[0] < 0:
            return reply({"error": "out of memory"}, "503 Busy")
        scored.extend(item["id"] for item in items)
        return good(items)

    with raw(judge_that(scoring)) as (url, _):
        command = ["score", str(image_folder), "--reward", url, "--batch", "2", "--out", str(tmp_path / "s.csv")]
        assert main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            error.endswith(f"the scores so far are in {tmp_path / 's.csv.0.partial'}: --resume goes on") and "503 (out of memory)" in error
        )
        left[0] = 99
        assert main([*command, "--resume"]) == 0
    assert len(scored) == len(set(scored)) == 8 and len((tmp_path / "s.csv").read_text().splitlines()) == 9


def test_remote_judges_need_the_flag(image_folder, tmp_path, capsys):
    url = "http://judge.example.com"
    for command in (
        ["score", str(image_folder), "--reward", url],
        ["pairs", "--from", str(image_folder), "--reward", url, "--out", str(tmp_path / "p")],
        ["rewards", "calibrate", url, str(image_folder)],
        [
            "train",
            "--model=demo",
            "--images=demo",
            f"--reward={url}",
            f"--out={tmp_path / 'r'}",
            "--objective.name=ddpo",
        ],
    ):
        assert main(command) == 2
        assert re.fullmatch(r"error: .*is not this machine, and images would leave it: .*--allow-remote.*\n", capsys.readouterr().err), (
            command
        )
