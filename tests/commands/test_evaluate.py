"""Several tuned models are compared over one pipeline, and each generates what it would alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.commands import options
from trainer.commands.evaluate import _show, _warn_of_few_images
from trainer.generate import Generation, generate
from trainer.guidance import Slot, cfg, combined
from trainer.lora.file import load_lora, save_delta, save_lora
from trainer.metrics.study import BASE, Study
from trainer.models.load import load_policy
from trainer.models.second import with_network
from trainer.policy import Lora
from trainer.rewards.registry import weights_hashes
from trainer.runtime.files import file_hash

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def files(pipeline_folder, tmp_path_factory):
    """Two sets of weight differences and two LoRAs that differ in rank, alpha and modules, all random."""
    folder = tmp_path_factory.mktemp("tuned")
    kinds = {"tuned": None, "small": Lora(rank=2, alpha=2.0), "whole": None, "wide": Lora(4, 8.0, ("to_q", "to_v"))}
    for seed, (name, lora) in enumerate(kinds.items()):
        policy = load_policy(pipeline_folder)
        policy.add_lora(lora) if lora else policy.tune_weights()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter) if lora else 0.01 * torch.randn_like(parameter))
        path = folder / f"{name}.safetensors"
        save_lora(policy, path, {}) if lora else save_delta(policy, path, {}, None, torch.float32)
    return {name: folder / f"{name}.safetensors" for name in kinds}


def test_distances_of_fewer_images_than_features_are_warned_of(capsys):
    _warn_of_few_images(8, {"narrow": 8, "wide": 9, "dino": 384})
    said = capsys.readouterr().err
    assert said.startswith("warning: FID, KID and LogCov of 8 images: ") and said.count("\n") == 1
    assert "(wide has 9, dino has 384)" in said and "narrow" not in said
    _warn_of_few_images(384, {"wide": 9, "dino": 384})
    assert capsys.readouterr().err == ""


def test_one_pipeline_serves_the_base_and_every_tuned_model(pipeline_folder, reward_folder, files, tmp_path, monkeypatch, capsys):
    drawn, opened, opener, add = {}, [], options.open_policy, Study.add
    assert main(["convert", str(files["small"]), str(tmp_path / "small"), "--to", "peft"]) == 0
    files = {**files, "small": tmp_path / "small"}  # a peft folder is a LoRA too
    monkeypatch.setattr(options, "open_policy", lambda *a: opened.append(a[0]) or opener(*a))
    monkeypatch.setattr(Study, "add", lambda self, part, images: drawn.update(images) or add(self, part, images))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    names = [argument for name, file in files.items() for argument in ("--lora", f"{name}={file}")]
    shown = ["--prompts", str(tmp_path / "prompts.txt"), "-n", "2", "--steps", "4", "--switches", "0,2"]
    command = ["evaluate", "--model", str(pipeline_folder), *names, "--reward", str(reward_folder), *shown]
    assert main([*command, "--out", str(tmp_path / "x.json")]) == 0
    assert opened == [str(pipeline_folder)] and capsys.readouterr().err.count("FID, KID and LogCov of 4 images") == 1

    settings, prompts = Generation(steps=4), [p for p in PROMPTS for _ in range(2)]
    points = [(name, k) for name in files for k in (0, 2)]
    assert set(drawn) == {BASE, *points}
    alone = generate(load_policy(pipeline_folder), prompts, settings, {BASE: cfg(settings.base)})
    for name, file in files.items():
        policy = load_policy(pipeline_folder)
        load_lora(policy, file)
        alone |= generate(policy, prompts, settings, {(name, k): combined(settings.base, settings.tuned(), k) for k in (0, 2)})
    assert {point: float((images - drawn[point]).abs().max()) for point, images in alone.items()} == dict.fromkeys(drawn, 0.0)
    distances = [float((drawn[a] - drawn[b]).abs().max()) for a in drawn for b in drawn if a < b]
    assert min(distances) > 1e-3
    results = json.loads((tmp_path / "x.json").read_text())
    assert [(p["model"], p["k"]) for p in results["points"]] == points


def test_a_published_folder_of_two_unets_is_evaluated_without_a_lora(pipeline_folder, reward_folder, files, tmp_path, monkeypatch, capsys):
    """Its images are those of `sample`'s two pipelines; the UNet is known by its hash, and may be given beside LoRAs."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "ImageReFL_HPS_SD")
    (folder / "unet").rename(folder / "original_unet")
    tuned = shutil.copytree(folder / "original_unet", folder / "fine_tuned_unet")
    (file,) = tuned.glob("*.safetensors")
    torch.manual_seed(0)
    save_file({k: v + 0.02 * torch.randn_like(v) for k, v in load_file(file).items()}, file, {"format": "pt"})
    drawn, add = {}, Study.add
    monkeypatch.setattr(Study, "add", lambda self, part, images: drawn.update(images) or add(self, part, images))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["evaluate", "--model", str(folder), "--reward", str(reward_folder), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["-n", "2", "--steps", "4", "--switches", "2", "--out", str(tmp_path / "x.json")]
    assert main(command) == 0
    settings, prompts, base = Generation(steps=4), [p for p in PROMPTS for _ in range(2)], load_policy(folder)
    mixes = {BASE: cfg(settings.base), (folder.name, 2): combined(settings.base, settings.tuned(model="t"), 2)}
    alone = generate(base, prompts, settings, mixes, {"t": with_network(base, tuned)})
    assert {point: float((images - drawn[point]).abs().max()) for point, images in alone.items()} == dict.fromkeys(drawn, 0.0)
    assert float((drawn[BASE] - drawn[folder.name, 2]).abs().max()) > 1e-3
    found = json.loads((tmp_path / "x.json").read_text())["checkpoints"]
    assert found[folder.name] == {"run": folder.name, "step": None, "file": str(tuned), "sha256": file_hash(file)}
    both = [*command, "--overwrite", "--lora", f"small={files['small']}", "--tuned-unet"]
    assert main([*both, f"small={tuned}"]) == 2 and "two models are called small" in capsys.readouterr().err
    assert main([*both, f"whole={tuned}"]) == 0
    assert set(json.loads((tmp_path / "x.json").read_text())["checkpoints"]) == {"small", "whole"}


def test_the_base_has_loras_and_each_part_a_prompt(pipeline_folder, reward_folder, files, tmp_path, monkeypatch, capsys):
    """As a policy draws that loads the two LoRAs by itself; what a negative is not read for is refused."""
    drawn, add = {}, Study.add
    monkeypatch.setattr(Study, "add", lambda self, part, images: drawn.update(images) or add(self, part, images))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["evaluate", "--model", str(pipeline_folder), "--reward", str(reward_folder), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["-n", "2", "--steps", "4", "--switches", "2", "--out", str(tmp_path / "x.json"), "--lora", f"small={files['small']}"]
    chosen = ["--base-lora", f"{files['wide']}:0.5", "--tuned-prompt", "{prompt}, blurred", "--negative", "a cat"]
    assert main([*command, *chosen]) == 0
    policy, settings, prompts = load_policy(pipeline_folder), Generation(steps=4), [p for p in PROMPTS for _ in range(2)]
    load_lora(policy, files["wide"], 0.5, "wide")
    load_lora(policy, files["small"])
    base, tuned = Slot("wide", settings.guidance_scale, negative="a cat"), Slot("tuned", 1.0, prompt="{prompt}, blurred")
    alone = generate(policy, prompts, settings, {BASE: cfg(base), ("small", 2): combined(base, tuned, 2)})
    assert {point: float((images - drawn[point]).abs().max()) for point, images in alone.items()} == dict.fromkeys(drawn, 0.0)
    config = json.loads((tmp_path / "x.json").read_text())["config"]
    assert (config["base_strength"], config["tuned_prompt"], config["negative"]) == (0.5, "{prompt}, blurred", "a cat")
    for flags, scale in (["--tuned-negative", "x"], "--tuned-guidance-scale"), (["--negative", "x", "--guidance-scale", "1"], "--guidance"):
        assert main([*command, "--overwrite", *flags]) == 2
        assert f"is read with guidance alone: give {scale}" in capsys.readouterr().err


def test_values_that_are_not_finite_are_never_ranked(tmp_path):
    """Images, a reward's scores and features, each with its name and prompt."""

    def study(score=0.0, feature=0.0):
        rewards = {"mine": lambda images, prompts: torch.tensor([0.0, score])}
        features = {"far": lambda images: torch.tensor([[0.0], [feature]])}
        judges = SimpleNamespace(
            judge=lambda images, prompts: {"mine": rewards["mine"](images, prompts), "features far": features["far"](images)}
        )
        return SimpleNamespace(points=[BASE], judges=judges, _path=lambda number: tmp_path / f"{number}.safetensors")

    part, images = SimpleNamespace(prompts=PROMPTS, number=0), {BASE: torch.zeros(2, 3, 8, 8)}
    Study.add(study(), part, images)
    bad = {BASE: images[BASE].index_fill(0, torch.tensor([1]), float("nan"))}
    for made, drawn, message in (
        (study(), bad, "base from step 0 drew values that are not finite for 'a blue ring'"),
        (study(score=float("nan")), images, "mine of base from step 0 gave values that are not finite for 'a blue ring'"),
        (study(feature=float("inf")), images, "features far of base from step 0 gave values that are not finite for 'a blue ring'"),
    ):
        with pytest.raises(ValueError, match=message):
            Study.add(made, part, drawn)


def snapshot_files(files, folder):
    """A run's folder with the same LoRA at two steps, weaker in the first."""
    state, layout = load_file(files["small"]), safe_open(files["small"], "pt").metadata()
    folder.mkdir()
    for step, strength in ((2, 0.1), (4, 1.0)):
        scaled = {key: value * strength if "up" in key or "lora_B" in key else value for key, value in state.items()}
        header = {**layout, "imagerefl": json.dumps({"step": step})}
        save_file(scaled, folder / f"lora-{step:06d}.safetensors", metadata=header)
    return folder


@pytest.mark.slow
def test_curves_over_snapshots_switches_and_rewards(pipeline_folder, reward_folder, files, tmp_path, capsys):
    run, earlier = snapshot_files(files, tmp_path / "small"), tmp_path / "reward"
    shutil.copytree(reward_folder, earlier)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shown = ["--prompts", str(tmp_path / "prompts.txt"), "-n", "3", "--steps", "4", "--switches", "0,2"]
    out = tmp_path / "x.json"
    command = ["evaluate", "--model", str(pipeline_folder), "--lora", str(run), "--reward", str(earlier), *shown, "--out", str(out)]
    assert main([*command, "--plot"]) == 0
    results = json.loads(out.read_text())
    assert [(p["model"], p["k"]) for p in results["points"]] == [(f"small@{step}", k) for step in (2, 4) for k in (0, 2)]
    assert [(c["run"], c["step"]) for c in results["checkpoints"].values()] == [("small", 2), ("small", 4)]
    assert results["weights"].keys() == {"model", str(earlier)} and all(len(value) == 64 for value in results["weights"].values())
    drawn = {kind: tmp_path / f"x.{kind}.png" for kind in ("tradeoff", "training")}
    first = {kind: path.read_bytes() for kind, path in drawn.items()}
    for path in drawn.values():
        path.unlink()
    assert main(["evaluate", "--plot", "--out", str(out)]) == 0  # from the JSON file alone
    assert {kind: path.read_bytes() for kind, path in drawn.items()} == first
    (tmp_path / "other.json").write_text("{}")
    assert main(["evaluate", "--plot", "--out", str(tmp_path / "other.json")]) == 2
    assert main(["evaluate", "--plot", "--out", str(tmp_path / "none.json")]) == 2
    assert main(["evaluate", "--out", str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-3:]  # after a warning of few images
    assert ["was not written by" in said[0], "nothing to draw: no" in said[1], "nothing to evaluate: give --lora" in said[2]] == [True] * 3


@pytest.mark.slow
def test_an_evaluation_is_continued_with_its_own_weights_alone(pipeline_folder, reward_folder, files, tmp_path, monkeypatch, capsys):
    reward = tmp_path / "reward"
    shutil.copytree(reward_folder, reward)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shown = ["--prompts", str(tmp_path / "prompts.txt"), "-n", "2", "--steps", "3", "--switches", "0", "--lora", str(files["small"])]
    command = ["evaluate", "--model", str(pipeline_folder), "--reward", str(reward), *shown, "--out", str(tmp_path / "x.json")]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Study, "add", interrupt)
        assert main(command) == 130
    settings = tmp_path / "x.json.parts" / "settings.json"
    then = json.loads(settings.read_text())["weights"]
    state = load_file(reward / "model.safetensors")
    save_file({key: value + 1e-3 for key, value in state.items()}, reward / "model.safetensors")
    now = weights_hashes(str(reward))[str(reward)]
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"sha256 {then[str(reward)][:12]}, now {now[:12]}; add --overwrite to start again" in error and "--reward PATH" in error
    before = {key: value for key, value in json.loads(settings.read_text()).items() if key != "weights"}  # as 0.2.0 wrote it
    settings.write_text(json.dumps(before))
    assert main([*command, "--resume"]) == 0


def test_the_rows_of_an_evaluation_fit_a_terminal(capsys):
    """A line for each model, under one of names, rewards of any number aside; all figures are in the file."""
    figures = {"demo-proxy": 0.5, "demo-gold": -12.25, "diversity": 0.4, "vendi": 2.0}
    distances = {f"{name}{kind}": 1.0 for name in ("", "reader_", "demo-proxy_") for kind in ("fid", "kid", "logcov")}
    results = {"base": {**figures, "fid": -0.0}, "points": [{"model": "a long name", "k": 0, **figures, **distances}]}
    _show(results, 20, Path("e.json"))
    head, base, point, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "k", "demo-proxy", "demo-gold", "diversity", "fid", "logcov"] and len(point) <= 80
    assert point.split("  ")[0] == "a long name" and point.split()[3:] == ["0", "0.500", "-12.250", "0.400", "1.000", "1.000"]
    assert base.index("-12.250") == point.index("-12.250") == head.index("demo-gold")
    assert note == "8 more figures of each, and 95 % intervals, are in e.json"
