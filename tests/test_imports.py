"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMFY = {"comfy", "comfy_api", "folder_paths", "nodes", "server", "execution", "latent_preview"}


def is_module(name):
    """Whether a dotted name is a file or a package of the repository."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path):
    """Absolute module names that a file imports, relative ones resolved against the repository root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            place = [*package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*place, *([node.module] if node.module else [])])
            # `from . import a` names the module a, not its package
            modules = [alias.name for alias in node.names if is_module(f"{source}.{alias.name}")]
            yield from (f"{source}.{name}" for name in modules)
            if len(modules) < len(node.names):
                yield source


def test_the_trainer_never_imports_comfyui_or_the_nodes():
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & COMFY, path


# From the bottom to the top: a file may import what stands on its own line (in its own package) or on a line above it.
ORDER = (
    ("text",),
    ("config",),
    ("runtime",),
    ("rng",),
    ("denoiser",),
    ("sampling",),
    ("density",),
    ("guidance",),
    ("guide_table",),
    ("guides",),
    ("policy",),
    ("reward",),
    ("generate",),
    ("search",),
    ("data",),
    ("lora",),
    ("models",),
    ("rewards",),
    ("noise",),
    ("metrics",),
    ("objectives",),
    ("scoring",),
    ("pairs",),
    ("taste",),
    ("training",),
    ("memory",),
    ("demo",),
    ("commands",),
    ("__main__",),
)


def room(name):
    """`trainer.models.flux` -> `models`."""
    return name.split(".")[1] if "." in name else ""


def test_imports_follow_the_order_of_the_packages():
    floor = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = []
    for path in (ROOT / "trainer").rglob("*.py"):
        own = path.relative_to(ROOT / "trainer").with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            if name.startswith("trainer.") and floor[room(name)] > floor[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle():
    graph = {}
    for path in (ROOT / "trainer").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {other for other in imports(path) if other.startswith("trainer.") and other != name}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kinds_of_objectives_do_not_import_one_another():
    kinds = {path.parent.name for path in (ROOT / "trainer" / "objectives").glob("*/__init__.py")}
    assert kinds == {"preference", "policy_gradient", "reward_gradient"}
    for path in (ROOT / "trainer" / "objectives").glob("*/*.py"):
        others = {f"trainer.objectives.{kind}" for kind in kinds - {path.parent.name}}
        assert not any(name.startswith(tuple(others)) for name in imports(path)), path


def test_nothing_but_the_demo_knows_the_embedded_world():
    for path in (ROOT / "trainer").rglob("*.py"):
        if "demo" not in path.parts and "commands" not in path.parts:
            assert not any(name.startswith("trainer.demo") for name in imports(path)), path


def test_importing_the_pack_imports_nothing():
    code = "import sys; before = set(sys.modules); import importlib.util as u; s = u.spec_from_file_location('pack', '__init__.py'); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); assert 'torch' not in sys.modules and m.comfy_entrypoint"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_requirements_are_the_base_dependencies():
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    assert lines == project["dependencies"]
    assert not any(line.startswith(("torch", "comfy")) for line in lines)
