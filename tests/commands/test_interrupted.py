"""Commands that are killed, or whose disk is full: what was finished is there, the same command completes it, all else is as it was."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer import demo
from trainer.__main__ import main
from trainer.commands.options import quiet_libraries
from trainer.demo import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the commands are forked, to spare the imports")

LORA = Path(demo.__file__).parent / "weights" / "loras" / "refl.safetensors"
TINY = compare.Size(budget=60, batch=2, prompts=2, per_prompt=2, watched=1, points=1, real=8)
WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink"}
PASSING = (
    ".parts",
    "scores/settings.json",
    "scores/0",
    "scores/.tmp",
    ".partial",
    ".writing",
    "watch.json",
    "best.safetensors",
)  # parts of their names: what a run replaces as it goes


def content(path):
    """A file's bytes; of safetensors, whose header has no fixed order, the parts of the header and the data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or end > len(data):
        return data
    return json.loads(data[8:end]), data[end:]


class Case:
    """One command in a folder: its files, the command, and the command that goes on."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        self.prepare()

    def prepare(self):
        """What is there before."""

    def start(self):
        """The command."""
        return main(self.command())

    def resume(self):
        """The command that goes on; 0 where it has nothing left to do."""
        return main([*self.command(), "--resume"])

    def results(self):
        """Finished files and their content, which a run that was interrupted shares with one that was not."""
        return {str(p.relative_to(self.folder)): content(p) for p in sorted(self.folder.rglob("*")) if p.is_file()}


class Sample(Case):
    old = '{"steps": 1, "method": "ddpm", "seed": 0, "model": "demo", "lora": "", "k": null, "images": 7}'

    def prepare(self):
        out = self.folder / "o"
        out.mkdir()
        (out / "settings.json").write_text(self.old)
        for i in range(7):
            (out / f"{i:05d}.png").write_bytes(b"old")
            (out / f"{i:05d}.txt").write_bytes(b"old")
        (out / "mine.png").write_bytes(b"mine")

    def command(self, how="--overwrite"):
        return ["sample", "--prompt", "a red star", "-n", "5", "--steps", "2", "--chunk", "2", "--out", str(self.folder / "o"), how]

    def resume(self):
        code = main(self.command("--resume"))
        return main(self.command()) if code == 2 else code  # killed before the old images were gone

    def results(self):
        return {name: content for name, content in super().results().items() if content not in (b"old", self.old.encode())}


class Score(Case):
    def prepare(self):
        (self.folder / "in").mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(self.folder / "in" / f"{i}.png")
            (self.folder / "in" / f"{i}.txt").write_text(f"prompt {i % 2}")
        (self.folder / "bright.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
        (self.folder / "best").mkdir()
        (self.folder / "best" / "mine.png").write_bytes(b"mine")

    def command(self):
        outs = [argument for name in ("s.csv", "s.jsonl") for argument in ("--out", name)]
        rewards = ["--reward", "bright.py", "--reward", "compressibility", "--raw", "--batch", "1"]
        return ["score", "in", *rewards, *outs, "--top", "1", "--write-back"]

    def start(self):
        os.chdir(self.folder)
        return super().start()

    def resume(self):
        os.chdir(self.folder)
        left = list(self.folder.glob("*.partial"))
        return super().resume() if left or not (self.folder / "s.jsonl").exists() else 0


class Pairs(Case):
    def prepare(self):
        (self.folder / "p.txt").write_text("a red star\na large blue ring on a black background\n")

    def command(self):
        given = ["--prompts", str(self.folder / "p.txt"), "--reward", "demo-proxy", "--heldout", "demo-heldout", "--split", "0.5"]
        return ["pairs", *given, "-n", "2", "--steps", "2", "--chunk", "2", "--batch", "2", "--out", str(self.folder / "o")]

    def results(self):
        """Without the journal, which has the time of each file."""
        return {name: content for name, content in super().results().items() if ".partial" not in name}


class Evaluate(Case):
    def prepare(self):
        (self.folder / "p.txt").write_text("a red star\na blue ring\na green dot\n")

    def command(self):
        given = ["--lora", f"x={LORA}", "--prompts", str(self.folder / "p.txt"), "--reward", "demo-proxy", "--switches", "0"]
        return ["evaluate", *given, "-n", "2", "--steps", "2", "--chunk", "2", "--out", str(self.folder / "j.json")]

    def resume(self):
        return super().resume() if (self.folder / "j.json.parts").exists() or not (self.folder / "j.json").exists() else 0


class Convert(Case):
    layout = "kohya"

    def command(self):
        return ["convert", str(LORA), str(self.folder / "c"), "--to", self.layout]

    def resume(self):
        return 0 if (self.folder / "c").exists() else main(self.command())


class ConvertFolder(Convert):
    layout = "peft"

    def resume(self):
        return 0 if (self.folder / "c" / "adapter_model.safetensors").exists() else main(self.command())


class Compare(Case):
    def prepare(self):
        (self.folder / "out" / "scores").mkdir(parents=True)
        (self.folder / "out" / "scores" / "mine.safetensors").write_bytes(b"mine")

    def start(self):
        quiet_libraries()
        compare.compare(["refl"], self.folder / "out", TINY, 0)
        return 0

    resume = start

    def results(self):
        found = {n: c for n, c in super().results().items() if not n.endswith((".pt", ".jsonl", ".html", ".lock", "config.json"))}
        whole = found.pop("out/results.json", None)
        if whole is not None:
            found["results"] = {k: v for k, v in json.loads(whole).items() if k not in ("seconds", "peak_rss_mb")}
        return found


SLOW = [pytest.param(case, marks=pytest.mark.full) for case in (Pairs, Compare)]
CASES = [Sample, Score, Evaluate, Convert, ConvertFolder, *SLOW]
ROOM = {Sample: 4000, Score: 150, Pairs: 900, Evaluate: 900, Convert: 5000, ConvertFolder: 400, Compare: 20_000}  # bytes of a file


class Changes:
    """Counts the changes that this process makes in a folder, and kills it before one."""

    folder, count, fatal = "/nowhere", 0, 0

    def __call__(self, event, arguments):
        writing = event in WRITING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writing and os.path.abspath(str(arguments[0])).startswith(self.folder):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


CHANGES = Changes()


def fork(work, folder, *, fatal=0, room=None):
    """Run `work` in a child; killed before its change number `fatal` of the folder x, or with files of `room` bytes at most."""
    said, end = os.pipe()
    process = os.fork()
    if process:
        os.close(end)
        return process, said
    code = 99
    try:
        sys.stdout = sys.stderr = os.fdopen(end, "w", buffering=1)
        CHANGES.folder, CHANGES.count, CHANGES.fatal = str(folder / "x"), 0, fatal
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        torch.set_num_threads(1)  # renews the pool that a fork leaves broken: threads that load weights would race for it
        code = work()
    except OSError as error:  # of what is not started by `main`, which does the same
        code = 2
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    """Exit status of a child, negative where a signal ended it, and what it said."""
    process, said = child
    with os.fdopen(said) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """For each command the results of a run without interruption and its number of changes in its folder."""
    found = {}
    sys.addaudithook(CHANGES)

    def whole(case):
        if case not in found:
            folder = tmp_path_factory.mktemp("whole") / "x"
            mine, CHANGES.folder, CHANGES.count = case(folder), str(folder), 0
            assert mine.start() == 0
            found[case] = mine.results(), CHANGES.count
            CHANGES.folder = "/nowhere"
        return found[case]

    before = os.getcwd()
    yield whole
    os.chdir(before)


def check(case, folder, mine, whole):
    """What is there is whole, going on completes it, and nothing else has changed."""
    kept = {n: c for n, c in mine.results().items() if not any(part in n for part in PASSING)}
    wrong = [n for n, c in kept.items() if whole.get(n) != c and not (case is Score and n.startswith("in"))]
    assert not wrong, wrong
    code, said = ended(fork(mine.resume, folder))
    assert code == 0, said
    found = mine.results()
    assert found.keys() == whole.keys() and [n for n in found if found[n] != whole[n]] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("moment", [0.3, 0.8])
def test_a_command_that_is_killed_between_two_writes_is_completed_by_another(case, moment, wholes, tmp_path):
    whole, count = wholes(case)
    mine = case(tmp_path / "x")
    assert ended(fork(mine.start, tmp_path, fatal=max(1, round(moment * count))))[0] == -signal.SIGKILL
    check(case, tmp_path, mine, whole)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_command_that_is_killed_before_any_of_its_writes_is_completed_by_another(case, wholes, tmp_path):
    whole, count = wholes(case)
    moments = range(1, count + 1) if count <= 40 else sorted(random.Random(0).sample(range(1, count + 1), 40))
    for moment in moments:
        (tmp_path / f"{moment}").mkdir()
        mine = case(tmp_path / f"{moment}" / "x")
        assert ended(fork(mine.start, tmp_path / f"{moment}", fatal=moment))[0] == -signal.SIGKILL
        check(case, tmp_path / f"{moment}", mine, whole)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_command_that_is_killed_at_twenty_random_moments_is_completed_by_another(case, wholes, tmp_path):
    whole, _ = wholes(case)
    (tmp_path / "timed").mkdir()
    begin, killed = time.monotonic(), 0
    assert ended(fork(case(tmp_path / "timed" / "x").start, tmp_path / "timed"))[0] == 0
    seconds = time.monotonic() - begin
    for moment in range(20):
        (tmp_path / f"{moment}").mkdir()
        mine = case(tmp_path / f"{moment}" / "x")
        child = fork(mine.start, tmp_path / f"{moment}")
        time.sleep(random.Random(moment).uniform(0, seconds))
        os.kill(child[0], signal.SIGKILL)
        killed += ended(child)[0] == -signal.SIGKILL
        check(case, tmp_path / f"{moment}", mine, whole)
    print(f"{case.__name__}: {killed} of 20 were killed before their end")
    assert killed >= 5


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(case, wholes, tmp_path):
    """Files of a limited size stand for it: the system refuses the bytes beyond, as a full disk does."""
    whole, _ = wholes(case)
    mine = case(tmp_path / "x")
    code, said = ended(fork(mine.start, tmp_path, room=ROOM[case]))
    assert code == 2, said
    said = said.replace("\r", "\n").splitlines()[-1]
    assert said.startswith(f"error: cannot write {tmp_path}") or (case is Score and said.startswith("error: cannot write s.csv")), said
    check(case, tmp_path, mine, whole)
