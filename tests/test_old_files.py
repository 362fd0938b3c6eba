"""Files that version 0.1.0 made (tests/data/v010) load, resume and convert, and give what they gave there."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.commands.preset import text_of
from trainer.config import build, override, read_toml
from trainer.demo import files
from trainer.lora.file import load_lora, read_adapter
from trainer.models.unet import UNetPolicy
from trainer.training.config import TrainConfig

DATA = Path(__file__).parent / "data" / "v010"
RESUMED = json.loads((DATA / "expected" / "resumed.json").read_text("utf-8"))
RUNS = ("imagerefl", "sqdf", "sqdf-black-box", "srpo", "draft-lv")
CLOSE = 1e-5  # relative to the largest entry; other processors and versions of PyTorch round otherwise


def same_machine():
    """Whether float32 results must be the same bits: the processor and PyTorch are those that made the expected ones."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    cpu = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in text.split("\n\n")[0].splitlines())}
    return {**cpu, "kernels": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}.items() >= RESUMED["machine"].items()


def difference(found, expected):
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-8))


@pytest.fixture
def copy(tmp_path, monkeypatch, earlier_rewards):
    """A copy of the folder that is the working directory, with the embedded rewards of that version."""
    shutil.copytree(DATA, tmp_path / "v010")
    monkeypatch.chdir(tmp_path / "v010")
    return tmp_path / "v010"


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_from_its_checkpoint_as_it_did(run, copy):
    assert main(["train", f"{run}.toml", "--resume", "--steps=4"]) == 0
    found, expected = load_file(copy / run / "lora.safetensors"), load_file(copy / "expected" / f"{run}.safetensors")
    assert found.keys() == expected.keys()
    if same_machine():
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    else:  # an update of Adam's hardly depends on a gradient's size, so a rounding may move a small entry by much of a step
        assert max(difference(found[key], expected[key]) for key in expected) < 0.02
    log = [json.loads(line) for line in (copy / run / "log.jsonl").read_text("utf-8").splitlines()]
    for line, then in zip(log, RESUMED["log"][run], strict=True):
        assert {name: line[name] for name in then} == pytest.approx(then, rel=1e-3, abs=1e-5)
    if run == "imagerefl":
        for point, then in zip(json.loads((copy / run / "watch.json").read_text("utf-8")), RESUMED["watch"], strict=True):
            assert {name: point[name] for name in then} == pytest.approx(then, rel=1e-3, abs=1e-5)
            assert point.keys() - then.keys() <= {"fid", "logcov"}  # to the training images, measured since


def test_encoded_images_in_a_cache_are_found(copy):
    before = {path: path.stat().st_mtime_ns for path in (copy / "cache").iterdir()}
    assert main(["train", "imagerefl.toml", "--cache=cache", "--out=cached", "--steps=1", "--watch.every=0"]) == 0
    images = {path: path.stat().st_mtime_ns for path in (copy / "cache").iterdir() if "mean" in load_file(path)}
    assert len(before) == 4 and images == before  # none was encoded again, under this or another name


def test_a_full_fine_tune_takes_the_steps_that_it_took(copy):
    assert main(["train", "full.toml"]) == 0
    expected, then = load_file(copy / "delta.safetensors"), json.loads((copy / "expected" / "full.json").read_text("utf-8"))
    found = load_file(copy / "full" / "delta.safetensors")
    if same_machine():
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert max(difference(found[key], expected[key]) for key in expected) < 0.1
    names = list(torch.load(copy / "full" / "checkpoint.pt", weights_only=True)["adapter"])
    assert (len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()) == (
        then["parameters"],
        then["sha256 of their names, one a line"],
    )
    for line, old in zip(map(json.loads, (copy / "full" / "log.jsonl").read_text("utf-8").splitlines()), then["log"], strict=True):
        assert {name: line[name] for name in old} == pytest.approx(old, rel=1e-3, abs=1e-5)


X0 = load_file(DATA / "expected" / "x0.safetensors")


@pytest.mark.parametrize("name", sorted(X0))
def test_a_lora_loads_whole_and_predicts_what_it_did(name):
    policy = UNetPolicy.load(files.PIPELINE)
    if name != "base":
        load_lora(policy, DATA / name)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = policy.denoiser(["a red star"], guidance_scale=2.0)(3 * noise, torch.tensor([3.0]))
    assert difference(found, X0[name]) < CLOSE
    zero = name in ("base", "imagerefl/best.safetensors")  # that run was best before its first step
    assert zero or difference(X0["base"], X0[name]) > 20 * CLOSE  # an adapter without effect would show


@pytest.mark.parametrize("source", ["converted-peft", "converted-diffusers.safetensors"])
def test_converted_loras_convert_back(source, copy):
    assert main(["convert", source, "back.safetensors", "--to", "kohya"]) == 0
    found, expected = read_adapter(copy / "back.safetensors").updates, read_adapter(copy / "imagerefl" / "lora.safetensors").updates
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        scale, found_scale = update.alpha / update.rank, found[module].alpha / found[module].rank
        assert difference(found_scale * found[module].up @ found[module].down, scale * update.up @ update.down) < 1e-6


def test_a_full_fine_tunes_differences_give_the_same_lora(copy):
    assert main(["convert", "delta.safetensors", "again.safetensors", "--rank", "2"]) == 0
    found, expected = read_adapter(copy / "again.safetensors").updates, read_adapter(copy / "delta-lora.safetensors").updates
    assert found.keys() == expected.keys()
    for module, update in expected.items():  # the factors' signs are free, their product is not
        assert difference(found[module].up @ found[module].down, update.up @ update.down) < 1e-4


@pytest.mark.parametrize("preset", sorted((DATA / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_a_preset_means_what_it_meant(preset, tmp_path):
    values = read_toml(preset)
    config = build(TrainConfig, values)
    present = Path(__file__).parent.parent / "presets" / preset.name
    if not present.exists():  # the table's
        method, model = preset.stem.rsplit("-", 1)
        present = tmp_path / preset.name
        present.write_text(text_of(method, model, preset.stem), "utf-8")
    moved = ("objective", *(("steps", "learning_rate") if preset.stem in ("imagerefl-demo", "refl-demo") else ()))  # trained harder since
    if preset.stem in ("imagerefl-sd15", "refl-sd15"):  # recompute the decoder alone, which changes no result and takes less time
        moved += ("gradient_checkpointing_denoiser", "gradient_checkpointing_reward")
    assert config == build(TrainConfig, {**read_toml(present), **{key: getattr(config, key) for key in moved}})
    assert build(TrainConfig, override(values, ["--batch=4", "--lr=0.5", "--objective.guidance=3.0"])) != config


def test_scoring_and_evaluation_give_the_same_tables(copy):
    score = ["score", "images", "--reward", "demo-proxy", "--reward", "demo-heldout=0.5"]
    assert main([*score, "--out", "stopped.csv", "--resume"]) == 0  # two of four images were scored by 0.1.0
    assert main([*score, "--out", "again.jsonl"]) == 0
    assert (copy / "stopped.csv").read_text("utf-8").splitlines()[0] == (copy / "scores.csv").read_text("utf-8").splitlines()[0]
    for line, then in zip((copy / "again.jsonl").read_text("utf-8").splitlines(), (copy / "scores.jsonl").read_text("utf-8").splitlines()):
        assert json.loads(line) == approximately(json.loads(then))


def test_a_measured_scale_of_a_reward_is_used(copy):
    assert main(["score", "images", "--reward", "brightness.py", "--prompt", "none", "--out", "brightness.csv"]) == 0
    rows = list(csv.DictReader((copy / "brightness.csv").read_text("utf-8").splitlines()))
    raw, scaled = ([float(row[f"brightness.py{end}"]) for row in rows] for end in ("", "_z"))
    assert scaled == pytest.approx([(value - 0.42715250328183174) / 0.279243427426279 for value in raw], abs=1e-4)
    assert (statistics.mean(scaled), statistics.stdev(scaled)) == pytest.approx((0, 1), abs=1e-4)  # it was measured on these images


def test_an_evaluation_gives_the_same_figures_and_an_interrupted_one_with_other_judges_is_refused(copy, capsys):
    common = ["--lora", "tuned=imagerefl/lora.safetensors", "--prompts", "prompts.txt", "-n", "2", "--steps", "4", "--chunk", "4"]
    common += ["--switches", "0,2", "--reward", "demo-proxy"]
    assert main(["evaluate", *common, "--out", "again.json"]) == 0
    found, expected = (json.loads((copy / name).read_text("utf-8")) for name in ("again.json", "evaluate.json"))
    base = {name: value for name, value in expected["base"].items() if name not in ("fid", "logcov")}  # to itself: 0
    assert found["base"] == approximately(of_the_reader(base))
    assert found["points"] == approximately([of_the_reader(point) for point in expected["points"]])
    assert main(["evaluate", *common, "--out", "stopped.json", "--resume"]) != 0  # that version measured diversity by the reader alone
    assert "was started with different judges" in capsys.readouterr().err


def of_the_reader(figures):
    """Figures under their present names: those of the reader were without prefix."""
    own = ("diversity", "vendi", "fid", "kid", "logcov")
    return {f"reader_{name}" if name in own else name: value for name, value in figures.items()}


def approximately(value):
    """pytest.approx, through dictionaries and lists of any depth; what was added since may be there."""
    return _Approximately(value)


class _Approximately:
    def __init__(self, expected):
        self.expected = expected

    def __repr__(self):
        return repr(self.expected)

    def __eq__(self, found):
        if isinstance(self.expected, dict):
            return isinstance(found, dict) and all(key in found and found[key] == _Approximately(v) for key, v in self.expected.items())
        if isinstance(self.expected, list):
            return len(found) == len(self.expected) and all(f == _Approximately(v) for f, v in zip(found, self.expected))
        return found == (pytest.approx(self.expected, rel=1e-3, abs=1e-4) if isinstance(self.expected, float) else self.expected)
