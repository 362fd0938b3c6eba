"""`sample --search`: images, tables and refusals."""

from __future__ import annotations

import csv

import pytest

from trainer.__main__ import main
from trainer.commands import sample
from trainer.commands.options import policy_of
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.rewards.two_tower import TwoTower

PROMPT = "a large red star on a black background, crisp, vivid"


def run(out, *more, prompt=PROMPT):
    return main(list(map(str, ["sample", "--prompt", prompt, "--steps", 4, "--out", out, *more])))


@pytest.fixture(scope="module")
def opened():
    """The embedded model, loaded once."""
    found = []
    return lambda args: found[0] if found else found.append(policy_of(args)) or found[0]


@pytest.fixture(autouse=True)
def _one_model(opened, monkeypatch):
    monkeypatch.setattr(sample, "policy_of", opened)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_best_of_n_are_images_of_plain_sampling_sorted(tmp_path, capsys):
    assert run(tmp_path / "plain", "-n", 3) == 0
    search = ("--search", "best-of-n", "--reward", "demo-proxy", "--heldout", "demo-heldout")
    assert run(tmp_path / "best", "-n", 3, "--particles", 3, *search) == 0
    images = [sorted((tmp_path / name / f"0000{i}.png").read_bytes() for i in range(3)) for name in ("plain", "best")]
    assert images[0] == images[1]
    rows = table(tmp_path / "best-search" / "scores.csv")
    rewards = [float(row["reward"]) for row in rows]
    assert rewards == sorted(rewards, reverse=True) and all(row["heldout"] and row["model_calls"] == "12" for row in rows)
    assert "best-of-n with particles 3: 12 model calls, 3 decodes, 3 reward calls a prompt" in capsys.readouterr().out


def test_decodes_and_reward_calls_for_diversity_are_counted(tmp_path, monkeypatch):
    """Against the calls that the decoder and the reward's image tower get."""
    calls, decode, features = [], DiffusersPolicy.decode, TwoTower.image_features
    monkeypatch.setattr(DiffusersPolicy, "decode", lambda self, x: calls.extend(["decode"] * len(x)) or decode(self, x))
    monkeypatch.setattr(TwoTower, "image_features", lambda self, x: calls.extend(["tower"] * len(x)) or features(self, x))
    for diversity, expected in ((0.0, (6, 4)), (0.5, (8, 8))):
        calls.clear()
        more = ("-n", 2, "--particles", 4, "--search", "best-of-n", "--reward", "demo-proxy", "--diversity", diversity)
        assert run(tmp_path / f"{diversity}", *more) == 0
        row = table(tmp_path / f"{diversity}-search" / "scores.csv")[0]
        assert (calls.count("decode"), calls.count("tower")) == expected == (int(row["decodes"]), int(row["reward_calls"]))


def test_a_search_resumes_prompt_by_prompt_to_the_same_files(tmp_path, capsys):
    search = ("--prompt", "a blue ring", "-n", 2, "--search", "dlbs", "--reward", "demo-proxy")
    assert run(tmp_path / "a", *search) == 0
    whole, tables = files(tmp_path / "a"), files(tmp_path / "a-search")
    assert {"00000.csv", "00000.png", "00002.csv", "scores.csv"} <= tables.keys()
    assert [row["particle"] for row in table(tmp_path / "a-search" / "00000.csv") if row["step"] == "1"] == ["0", "1", "2", "3"]
    (tmp_path / "a" / "00002.png").unlink()
    assert run(tmp_path / "a", *search, "--resume") == 0
    assert files(tmp_path / "a") == whole and files(tmp_path / "a-search")["scores.csv"] == tables["scores.csv"]
    assert run(tmp_path / "a", *search, "--search-end", 0.5, "--resume") == 2
    assert "the run has another search" in capsys.readouterr().err


def test_a_few_step_lora_looks_ahead(tmp_path, monkeypatch, capsys):
    from trainer.demo import files

    monkeypatch.setattr(sample, "policy_of", policy_of)  # the shared model would keep the adapter
    more = ("-n", 1, "--search", "dlbs", "--reward", "demo-proxy", "--search-lookahead", 2, "--lookahead-lora", files.CONSISTENCY)
    assert run(tmp_path / "a", *more) == 0
    assert "dlbs with particles 2, children 2: 34 model calls, 14 decodes" in capsys.readouterr().out


@pytest.mark.full
def test_a_search_from_an_image_stays_near_it(tmp_path):
    from trainer.data.images import load

    assert run(tmp_path / "plain", "-n", 1, "--seed", 5) == 0
    start = tmp_path / "plain" / "00000.png"
    common = ("-n", 1, "--search", "code", "--search-block", 1, "--children", 2, "--reward", "demo-proxy", "--image", start)
    distance = {}
    for share in (0.25, 1.0):
        assert run(tmp_path / f"{share}", *common, "--image-strength", share) == 0
        distance[share] = float((load(tmp_path / f"{share}" / "00000.png", 64) - load(start, 64)).abs().mean())
    assert distance[0.25] < 0.5 * distance[1.0], distance


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--search", "fk"], "a search needs a reward: give --reward NAME"),
        (["--reward", "demo-proxy"], "--reward belongs to a search: give --search best-of-n|svdd"),
        (["--particles", "3"], "--particles belongs to a search"),
        (
            ["--search", "fk", "--reward", "demo-proxy", "--children", "2"],
            "--search fk takes no --children: it takes --particles, --search-block",
        ),
        (["--search", "fk", "--reward", "demo-proxy", "--search-ess", "2"], "ess = 2.0: give at most 1"),
        (["--search", "svdd", "--reward", "demo-proxy", "--method", "ddim"], "svdd branches, and --method ddim draws no noise"),
        (["--search", "fk", "--reward", "demo-proxy", "--budget", "7"], "a budget of 7 model calls is too small: fk with particles 4"),
        (
            ["--search", "fk", "--reward", "demo-proxy", "--budget", "70", "--particles", "4"],
            "--budget sets --particles: give one of the two",
        ),
        (["--search", "best-of-n", "--reward", "demo-proxy", "--particles", "2"], "4 images of 2 particles: give particles ≥ 4"),
        (["--search", "best-of-n", "--reward", "demo-proxy", "--image", "x", "--image-strength", "0"], "--image-strength: 0: give a share"),
        (
            ["--search", "best-of-n", "--reward", "demo-proxy", "--image-strength", "0.5"],
            "--image-strength is of --image: give --image FILE",
        ),
        (
            ["--search", "best-of-n", "--reward", "demo-proxy", "--image", "none.png"],
            "--image none.png does not exist: give an image",
        ),
        (["--image-strength", "0.5"], "--image-strength belongs to a search: give --search best-of-n|svdd"),
        (["--search", "best-of-n", "--reward", "nothing"], "unknown reward 'nothing'"),
        (["--search", "best-of-n", "--reward", "demo-proxy", "--diversity", "nan"], "--diversity: nan: give a finite number"),
        (
            ["--search", "best-of-n", "--reward", "demo-proxy", "--lookahead-lora", __file__],
            "--lookahead-lora: best-of-n scores nothing before the end of this run: leave it out",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, more, message, capsys):
    assert run(tmp_path / "a", *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "a").exists(), said


def test_a_reward_that_reads_the_prompt_needs_one(tmp_path, capsys):
    assert run(tmp_path / "a", "--search", "best-of-n", "--reward", "demo-proxy", prompt="") == 2
    assert "--reward scores an image under its prompt, and a prompt is empty" in capsys.readouterr().err


def test_folders_that_are_there_are_not_written_into(tmp_path, capsys):
    (tmp_path / "a-search").mkdir()
    assert run(tmp_path / "a", "--search", "best-of-n", "--reward", "demo-proxy") == 2
    assert "a-search exists: add --overwrite" in capsys.readouterr().err
