"""Presets: every cell of the table is a valid run, those of the papers' models keep their settings, and a step of them trains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.commands.preset import command_for, text_of
from trainer.config import build, override, read_toml
from trainer.lora.file import save_lora
from trainer.memory.planner import Planner
from trainer.models.load import MODELS, load_policy
from trainer.models.meta import meta_policy
from trainer.objectives import OBJECTIVES
from trainer.objectives.policy_gradient.collecting import Collecting
from trainer.policy import Lora
from trainer.runtime.processes import ALONE
from trainer.training.config import TrainConfig
from trainer.training.presets import METHODS, ROWS, SHORT

FOLDER = Path(__file__).parent.parent.parent / "presets"
FILES = [path for path in sorted(FOLDER.glob("*.toml")) if not path.stem.endswith("-demo")]
TINY = {"sd15": "sd15", "sdxl": "sdxl", "sd35-medium": "sd3", "flux-dev": "flux-dev", "z-image": "z-image", "flux2-klein-4b": "klein"}
TINY |= {"krea2": "krea2", "qwen-image": "qwen-image", "chroma": "chroma", "anima": "anima"}
EARLIER = [(method, model) for model in list(TINY)[:4] for method in ("draft-lv", "srpo", "sqdf")]
CELLS = [(method, model) for method in METHODS for model in TINY]


def settings(method, model, folder):
    """The preset as `train` reads it."""
    file = folder / f"{method}-{model}.toml"
    file.write_text(text_of(method, model), "utf-8")
    return read_toml(file)


def test_the_table_has_every_objective_and_every_published_model(capsys):
    assert list(METHODS) == list(OBJECTIVES) and list(ROWS) == list(MODELS)
    assert main(["preset", "--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed == {*METHODS, *ROWS}


def test_every_cell_is_a_valid_run(tmp_path):
    for method in METHODS:
        for model, row in ROWS.items():
            config = build(TrainConfig, settings(method, model, tmp_path))
            assert type(config.method) is OBJECTIVES[method]
            whole = config.batch_size * config.gradient_accumulation_steps
            if isinstance(config.method, Collecting):  # an optimizer step ends with a round, or divides it
                rollouts, trained = config.method.trained_steps(0, 0).shape
                assert rollouts * trained // whole in (1, 2, 3) and rollouts * trained % whole == 0, (method, model)
            else:
                assert whole == METHODS[method].samples
            assert config.method.steps <= (row.steps if row.few else 50) and config.method.guidance_scale <= (1 if row.few else 7.5)
            assert (
                config.watch.heldout != config.reward and sum(map(bool, (config.images, config.pairs, config.labels, config.prompts))) == 1
            )


def test_what_a_comment_offers_is_valid_too(tmp_path):
    """The turbo model of a base to draw evaluations with, and the training adapter of a distilled one."""
    offered = {name for name, row in ROWS.items() if row.turbo[0] or row.training_adapter}
    assert offered == {"z-image", "z-image-turbo", "krea2", "krea2-turbo", "flux2-klein-4b", "flux2-klein-9b", "flux-schnell"}
    for name in offered:
        text = text_of("refl", name)
        for key in ("training_adapter", "tuned_model", "tuned_steps"):
            text = text.replace(f"# {key} =", f"{key} =")
        (tmp_path / "preset.toml").write_text(text)
        config = build(TrainConfig, read_toml(tmp_path / "preset.toml"))
        assert bool(config.training_adapter) == ROWS[name].few != bool(config.watch.tuned_model)


def test_files_in_the_folder_are_the_tables(tmp_path):
    models = {path.stem.removeprefix("imagerefl-"): path for path in FILES}
    assert {MODELS[SHORT.get(name, name)][0] for name in models} == {family for family, _ in MODELS.values()}  # one for each family
    for name, path in models.items():
        assert path.read_text("utf-8") == text_of("imagerefl", name, path.stem), f"write it again: preset imagerefl --model {name}"


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    file = tmp_path / "presets" / "srpo-flux.toml"
    assert main(["train", str(file)]) == 2
    line = capsys.readouterr().err
    command = f"python -m trainer preset srpo --model flux --out {file}"
    assert line == f"error: no config file {file}; this command writes it: {command}\n"
    assert main(command.split()[3:]) == 0 and main(command.split()[3:]) == 2
    assert capsys.readouterr().err == f"error: {file} exists: --overwrite replaces it\n"
    assert read_toml(file)["out"] == "runs/srpo-flux"
    assert [command_for(Path(name)) for name in ("sdxl.toml", "my-refl-sdxl.toml", "refl-demo.toml")] == [""] * 3
    for given, expected in (
        (["preset", "srpo", "--model", "z-imag"], "no family 'z-imag': did you mean z-image?"),
        (["preset", "srpo", "--model", "flux3"], "no family 'flux3': did you mean flux?"),
        (["preset", "srrpo", "--model", "sdxl"], "no objective 'srrpo': did you mean srpo? use one of refl, "),
        (["preset", "srpo"], "give METHOD and --model FAMILY, or --list"),
        (["preset", "srpo", "--model", "demo"], "the embedded model has its presets in the folder presets"),
    ):
        assert main(given) == 2
        assert capsys.readouterr().err.startswith(f"error: {expected}")


@pytest.mark.full
def test_imagerefl_starts_at_the_papers_noise_level():
    expected = {"sdxl": 0.257}  # the authors' 87.5 %; elsewhere their SD1.5's 0.635, 0.388 in flow units
    for name, row in ROWS.items():
        if not row.few:
            policy = meta_policy(name)
            sigma = float(policy.sigmas(40)[row.start])
            assert (sigma if policy.space == "flow" else sigma / (1 + sigma)) == pytest.approx(expected.get(name, 0.388), abs=0.02), name
            assert (policy.image_size[0], math.prod(policy.latent_shape)) == (row.size, row.latent), name


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*-demo.toml")), ids=lambda p: p.stem)
def test_a_preset_of_the_embedded_model_is_planned(preset):
    config = build(TrainConfig, read_toml(preset))
    found = Planner(ALONE)(config)
    assert ("evaluation" in found.phases) == (config.watch.every > 0) and found.phases["training step"] > 0


def trains(method, model, family_folder, reward_folder, heldout_folder, image_folder, tmp_path):
    """Train a step of a preset on a tiny model, with nothing but paths and sizes changed; returns the exit status."""
    values, folder = settings(method, model, tmp_path), family_folder(TINY[model])
    changes = {"model": folder, "reward": reward_folder, "watch.heldout": heldout_folder, "out": tmp_path / "run"}
    changes |= {"device": "cpu", "steps": 1, "gradient_accumulation_steps": 1, "batch_size": 1, "image_size": 64, "watch.every": 0}
    if "images" in values:
        changes["images"] = image_folder
    elif "pairs" in values or "labels" in values:
        one, two = sorted(image_folder.glob("*.png"))[:2]
        key, rows = ("pairs", f"chosen,rejected,prompt\n{one},{two},a red star\n")
        if "labels" in values:
            key, rows = ("labels", f"image,prompt,label\n{one},a red star,1\n{two},a red star,0\n")
        changes[key] = tmp_path / "table.csv"
        changes[key].write_text(rows)
    else:
        changes["prompts"] = tmp_path / "prompts.txt"
        changes["prompts"].write_text("a red star\n")
    if method == "diffusion-kto":  # an image is compared with others
        changes["batch_size"] = 2
    if method == "sqdf-black-box":
        changes |= {"features": reward_folder, "objective.queries": [2], "objective.epochs": 1}
    if method in ("ddpo", "flow-grpo", "g2rpo", "awm"):
        changes |= {"objective.group": 2, "objective.prompts_per_round": 1, "objective.steps": 4}
        changes |= {"objective.trained_count": 2} if method == "ddpo" else {}
        changes |= {"objective.branch_steps": 2} if method == "g2rpo" else {}
    if method in ("spo", "pso"):
        changes["objective.prompts_per_round"] = 1
        changes |= {"objective.steps": 4, "objective.first_step": 1, "objective.gap": 0.0} if method == "spo" else {}
    if "consistency" in values:
        changes["consistency"] = tmp_path / "lcm.safetensors"
        policy = load_policy(folder)
        policy.add_lora(Lora())
        save_lora(policy, changes["consistency"], {})
    given = [f"--{key}={value}" for key, value in changes.items()]
    if method == "sqdf":  # with its second adapter
        assert Planner(ALONE)(build(TrainConfig, override(values, given))).phases["training step"] > 0
    assert main(["train", str(tmp_path / f"{method}-{model}.toml"), *given]) == 0
    assert (tmp_path / "run" / "lora.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), [*EARLIER, *(("imagerefl", model) for model in list(TINY)[:5])])
def test_a_preset_trains(method, model, family_folder, reward_folder, heldout_folder, image_folder, tmp_path):
    trains(method, model, family_folder, reward_folder, heldout_folder, image_folder, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("method", "model"), CELLS)
def test_every_cell_trains(method, model, family_folder, reward_folder, heldout_folder, image_folder, tmp_path):
    trains(method, model, family_folder, reward_folder, heldout_folder, image_folder, tmp_path)


def test_commands_in_messages_quote_paths_with_blanks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["preset", "refl", "--model", "sd15", "--out", "my runs/refl-sd15.toml"]) == 0
    assert capsys.readouterr().out.strip().endswith('python -m trainer train "my runs/refl-sd15.toml"')
    assert command_for(Path("my runs/refl-sd15.toml")).endswith('--out "my runs/refl-sd15.toml"')
    assert command_for(Path("runs/refl-sd15.toml")).endswith("--out runs/refl-sd15.toml")


def test_the_current_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["preset", "refl", "--model", "sd15", "--out", "."]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path} is a folder: give a file, such as refl-sd15.toml\n"
    (tmp_path / "mine.txt").touch()
    assert main(["train", "--out=.", "--model=demo"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} exists: add --overwrite to replace its run")
