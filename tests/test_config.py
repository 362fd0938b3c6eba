"""Configs: every wrong key, type and range is one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trainer.config import ConfigError, build, override, plain, present_names, read_toml
from trainer.training.config import TrainConfig


@dataclass(frozen=True)
class Inner:
    size: int = field(default=1, metadata={"min": 1, "max": 9})


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    on: bool = False
    limit: float | None = None
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_values_reach_their_fields_and_come_back_plain():
    built = build(Outer, {"name": "x", "rate": 1, "words": ["a"], "inner": {"size": 3}})
    assert built == Outer("x", 1.0, words=("a",), inner=Inner(3)) and isinstance(built.rate, float)
    assert plain(built)["inner"] == {"size": 3} and build(Outer, plain(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nme": "x"}, "unknown key 'nme'; did you mean name"),
        ({"name": "x", "inner": {"sise": 2}}, "unknown key 'inner.sise'; did you mean inner.size"),
        ({"name": True}, "name = True: expected str, got bool"),
        ({"name": "x", "on": 1}, "expected bool, got int"),
        ({"name": "x", "rate": "fast"}, "expected float, got str"),
        ({"name": "x", "inner": {"size": 10}}, "inner.size = 10: give at most 9"),
        ({"name": "x", "inner": {"size": 0}}, "give at least 1"),
        ({"name": "x", "words": "a"}, "expected a list"),
        ({"name": "x", "inner": "small"}, "inner = 'small': expected a table, write --inner.size=…"),
        ({"name": "x", "rate": float("nan")}, "rate = nan: expected a finite number"),
        ({"name": "x", "limit": float("-inf")}, "limit = -inf: expected a finite number"),
        ({}, "missing key 'name'"),
    ],
)
def test_what_is_wrong_is_said(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_command_line_overrides_toml(tmp_path):
    (tmp_path / "c.toml").write_text('name = "x"\n[inner]\nsize = 2\n')
    values = override(read_toml(tmp_path / "c.toml"), ["--inner.size=4", "--rate=1e-3", "--name=plain text", "--limit=none"])
    assert build(Outer, values) == Outer("plain text", 1e-3, inner=Inner(4))
    with pytest.raises(ConfigError, match="write --key=value"):
        override({}, ["rate"])
    (tmp_path / "windows.toml").write_bytes("name = 'ü'\r\n[inner]\r\nsize = 2\r\n".encode("utf-8-sig"))
    assert build(Outer, read_toml(tmp_path / "windows.toml")) == Outer("ü", inner=Inner(2))
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="no config file"):
        read_toml(tmp_path / "none.toml")


BACKSLASHES = "write a path with backslashes in single quotes, or with forward slashes"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (r'out = "D:\train\bilder"', r"c.toml: out = 'D:\train\x08ilder' holds a control character, as \t in double quotes is a tab"),
        (r'[watch]\nprompts = "a\neu.txt"'.replace(r"\n", "\n", 1), r"c.toml: watch.prompts = 'a\neu.txt' holds a control character"),
        (r'[inner]\nwords = ["a\fb"]'.replace(r"\n", "\n", 1), r"c.toml: inner.words = 'a\x0cb' holds a control character"),
        (r'a = 1\nout = "C:\Users\me"'.replace(r"\n", "\n", 1), "c.toml is not valid TOML: Invalid hex value (at line 2"),
        (r'out = "\\server\share"'.replace("\\\\", "\\"), "c.toml is not valid TOML: Unescaped '\\' in a string (at line 1"),
        (r'out = "D:\train\"', "c.toml is not valid TOML"),
    ],
)
def test_backslashes_of_windows_are_refused_with_the_valid_form(content, message, tmp_path):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_toml(tmp_path / "c.toml")
    assert message in str(error.value) and str(error.value).endswith(BACKSLASHES) and "\n" not in str(error.value)


def test_paths_of_windows_in_their_valid_forms_and_files_of_its_editors(tmp_path):
    text = 'out = \'D:\\train\\bilder\'\r\nimages = "D:/train"\r\nmodel = "D:\\\\sd"\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / "c.toml").write_bytes(text.encode(encoding))
        assert read_toml(tmp_path / "c.toml") == {"out": r"D:\train\bilder", "images": "D:/train", "model": r"D:\sd"}
    assert override({}, [r"--out=D:\train\bilder"]) == {"out": r"D:\train\bilder"}
    with pytest.raises(ConfigError, match=r"--out = 'D:\\train' holds a control character"):
        override({}, [r'--out="D:\train"'])
    for content, message in (("a = " + "[" * 10_000, "nested too deep"), ("a = " + "9" * 5000, "digits"), ("a = '\xe9'", "is not UTF-8")):
        (tmp_path / "c.toml").write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=rf"c.toml is not .*{message}" if message != "is not UTF-8" else message):
            read_toml(tmp_path / "c.toml")


def test_a_number_given_for_a_text_is_its_text():
    assert build(Outer, override({}, ["--name=12"])).name == "12"
    assert build(TrainConfig, override({"out": "x"}, ["--watch.switch=12"])).watch.switch == "12"


def test_an_objectives_name_alone_says_how_to_write_it():
    with pytest.raises(ConfigError, match=r"objective = 'refl': expected a table, write --objective\.name=refl$"):
        build(TrainConfig, override({"out": "x"}, ["--objective=refl"]))


def test_keys_of_0_1_0_stay_valid_everywhere():
    old = {"out": "x", "lr": 0.5, "batch": 2, "objective": {"name": "refl", "guidance": 2.0}, "checkpoint_decoder": True}
    new = {"out": "x", "learning_rate": 0.5, "batch_size": 2, "objective": {"name": "refl", "guidance_scale": 2.0}}
    assert present_names(old) == {**new, "gradient_checkpointing_vae": True}
    built = build(TrainConfig, override(old, ["--lr=0.25", "--warmup=3"]))  # the command line is stronger than the file, by either name
    assert (built.learning_rate, built.lr_warmup_steps, built.gradient_checkpointing_vae) == (0.25, 3, True)
    with pytest.raises(ConfigError, match="learning_rate is given twice: 'lr' is its old name"):
        build(TrainConfig, {"out": "x", "learning_rate": 1.0, "lr": 1.0})
    with pytest.raises(ConfigError, match="learning_rate is given twice: 'lr' is its old name"):
        build(TrainConfig, {"out": "x", "lr": 1.0, "learning_rate": 1.0})
    twice = override({"out": "x"}, ["--lr=0.5", "--learning_rate=0.25"])  # as of any flag, the last one counts
    assert build(TrainConfig, twice).learning_rate == 0.25


def test_objective_table_is_checked_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"name = 'refle': did you mean refl\? use one of refl, imagerefl"):
        TrainConfig(out="x", objective={"name": "refle"})
    with pytest.raises(ConfigError, match=r"name = 'dpo': did you mean diffusion-dpo\? use"):
        TrainConfig(out="x", objective={"name": "dpo"})
    with pytest.raises(ConfigError, match="use one of refl, imagerefl"):
        TrainConfig(out="x", objective={"name": ["refl"]})
    with pytest.raises(ConfigError, match="out is empty: give the output folder"):
        TrainConfig(out="")
    with pytest.raises(ConfigError, match=r"unknown key 'objective.stepz'"):
        TrainConfig(out="x", objective={"name": "refl", "stepz": 3})
    with pytest.raises(ConfigError, match="objective: gradient range"):
        TrainConfig(out="x", objective={"name": "refl", "steps": 5})


@pytest.mark.parametrize("preset", sorted((Path(__file__).parent.parent / "presets").glob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_is_a_valid_config(preset):
    config = build(TrainConfig, read_toml(preset))
    objective = config.method
    assert preset.stem.startswith(config.objective["name"])
    assert objective.steps in (20, 25, 40, 50)
