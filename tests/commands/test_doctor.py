"""`doctor` against independent facts, with a PyTorch that does not import, and in a home that must not be named."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL
import pytest
import torch

from trainer.__main__ import main
from trainer.commands.doctor import source_hash
from trainer.runtime import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Jane's home with a ComfyUI that holds another revision of this pack, and one reward's weights with their record."""
    folder = tmp_path / "home" / "jane"
    pack, reward = folder / "ComfyUI" / "custom_nodes" / "imagerefl", folder / "ComfyUI" / "models" / "rewards" / "hpsv2.1"
    pack.mkdir(parents=True), reward.mkdir(parents=True)
    (folder / "ComfyUI" / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    (pack / "pyproject.toml").write_text('name = "imagerefl"\nversion = "0.1.0"\n')
    (reward / "HPS_v2.1_compressed.pt").write_bytes(bytes(20_000_000))
    (reward / "HPS_v2.1_compressed.pt.json").write_text(json.dumps({"sha256": "abc123" * 10}))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("COMFYUI_PATH", str(folder / "ComfyUI"))
    monkeypatch.delenv("HF_HOME", raising=False)
    return folder


def test_the_report_holds_what_other_sources_say(home, capsys):
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    for name, distribution in environment.PACKAGES.items():
        version = importlib.metadata.version(distribution)
        assert facts["packages"][name]["version"].partition("+")[0] == version.partition("+")[0], name
    assert facts["packages"]["PIL"]["version"] == PIL.__version__
    assert len([d for d in facts["torch"]["devices"] if "cuda" in d["device"]]) == torch.cuda.device_count()
    if Path("/proc/meminfo").exists():
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024 / 1e9
        assert facts["system"]["memory"]["total_gb"] == pytest.approx(total, rel=0.02)
    assert {"PNG", "JPEG"} <= set(facts["images"]["opens"]) and facts["runs"]
    assert facts["comfyui"]["version"] == "0.3.64" and facts["comfyui"]["folder"] == "~/ComfyUI"
    assert facts["comfyui"]["packs"] == [{"folder": "imagerefl", "version": "0.1.0", "same_revision": False}]
    rewards = {row["name"]: row for row in facts["rewards"]}
    (file,) = rewards["hpsv2.1"]["files"]
    assert (rewards["hpsv2.1"]["state"], file["gb"], file["record"]) == ("here", 0.02, "sha256 abc123abc123 recorded")
    assert file["file"] == "~/ComfyUI/models/rewards/hpsv2.1/HPS_v2.1_compressed.pt"
    assert rewards["pickscore"]["state"] == rewards["inception"]["state"] == "missing" and rewards["demo-gold"]["state"] == "built in"
    said = " ".join(p["what"] for p in facts["problems"])
    assert "another revision" in said and "standardised scores of hpsv2.1" in said and "not here: hpsv2, pickscore" in said
    assert "jane" not in text and str(home) not in text
    assert all(p["remedy"] for p in facts["problems"])


def test_it_says_what_is_wrong_where_pytorch_does_not_import(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert main(["doctor"]) == 1
    facts, _, problems = capsys.readouterr().out.partition("What would not work:\n")
    assert "rewards: not known without PyTorch" in facts and "PyTorch's build" not in facts
    lines = problems.splitlines()
    assert lines[0].startswith(f"- everything: torch {importlib.metadata.version('torch')} does not import: ModuleNotFoundError")
    assert any(line.startswith("- rewards on CLIP") for line in lines) and all(line.startswith("- ") for line in lines)


@pytest.mark.full
def test_a_fresh_process_with_a_broken_pytorch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-m", "trainer", "doctor"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and "does not import: OSError: libcudart.so.13: cannot open" in ended.stdout, ended.stderr
    assert ended.stderr == ""


def test_packages_too_old_or_installed_twice_are_said(monkeypatch, capsys):
    monkeypatch.setattr(environment, "bounds", lambda: {"peft": "99.0"})
    monkeypatch.setattr("safetensors.__version__", "0.0.1")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "is older than 99.0: pip install -U 'peft>=99.0'" in said
    assert f"safetensors 0.0.1 is imported, pip knows {importlib.metadata.version('safetensors')}: two copies" in said
    assert environment.is_older("0.9.1", "0.11") and not environment.is_older("2.10.0+cu126", "2.10")


def test_homes_and_names_are_left_out(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "bob")
    monkeypatch.setenv("HOME", "/srv/people/bob")
    given = ["/srv/people/bob/x", "/srv/people/bobby", r"C:\Users\Al B\x y", "/home/ann/.cache: no", "/media/bob/disk", "/opt/bobcat"]
    assert environment.anonymous({"a": given})["a"] == [
        *("~/x", "/srv/people/bobby", r"~\x y", "~/.cache: no", "/media/USER/disk", "/opt/bobcat"),
    ]


def test_a_card_needs_kernels_of_its_generation_or_intermediate_code():
    has = environment._has_kernels
    assert has(["sm_80"], 8, 6) and not has(["sm_86"], 8, 0) and not has(["sm_90"], 12, 0) and has(["sm_50", "compute_90"], 12, 0)
    assert has(["sm_120"], 12, 0) and has(["sm_90a"], 9, 0) and not has(["sm_70", "sm_80"], 6, 1)


def test_the_hash_of_the_source_knows_files_not_line_ends(tmp_path):
    for folder, end in (("a", "\n"), ("b", "\r\n"), ("c", "\n\n")):
        (tmp_path / folder / "trainer").mkdir(parents=True)
        (tmp_path / folder / "trainer" / "x.py").write_bytes(f"x = 1{end}".encode())
    one, two, three = (source_hash(tmp_path / folder) for folder in "abc")
    assert one == two != three and len(one) == 12
