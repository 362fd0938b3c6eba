"""The pages: links lead somewhere, the examples are the tested files, every claim's command is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = ("tests/objectives/snippets/one_step.py", "tests/rewards/warmth.py", "tests/models/snippets/family.py")


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_architecture_are_the_tested_files(example):
    source = (ROOT / example).read_text("utf-8")
    assert len(source.splitlines()) <= 30
    assert f"```python\n{source}```" in (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_tested_comfyuis_are_those_that_the_pack_knows():
    """The list in nodes/host.py against what users read, and the oldest against what the registry asks for."""
    listed = re.search(r"^TESTED = \((.*)\)$", (ROOT / "nodes" / "host.py").read_text("utf-8"), re.M)
    tested = re.findall(r'"([\d.]+)"', listed[1])
    for page in ("README.md", "docs/install.md", "docs/nodes.md"):
        said = re.search(r"0\.3\.48, (?:[\d.]+(?:, | and |))+", (ROOT / page).read_text("utf-8"))
        assert said and re.findall(r"[\d.]*\d", said[0]) == tested, (page, said and said[0])
    assert f'requires-comfyui = ">={tested[0]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_scripts_and_tests_named_in_the_docs_exist():
    missing = []
    for page in PAGES:
        for name in re.findall(r"\b(?:trainer|tests|tools|nodes|presets)/[\w/]+\.\w+", page.read_text("utf-8")):
            if not (ROOT / name).exists() and page.name != "upgrade.md":
                missing.append(f"{page.name}: {name}")
        for module in re.findall(r"python -m ((?:trainer|tools|tests)(?:\.\w+)+)", page.read_text("utf-8")):
            path = ROOT.joinpath(*module.split("."))
            if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
                missing.append(f"{page.name}: {module}")
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "upgrade.md"], ids=lambda path: path.name)
def test_functions_and_classes_named_in_the_docs_exist(page):
    """`metrics.dino.Dino`, with or without `trainer.` before it."""
    packages = "|".join(path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py"))
    missing = []
    for module, thing in re.findall(rf"`(?:trainer\.)?((?:{packages})\.\w+)\.(\w+)", page.read_text("utf-8")):
        try:
            found = hasattr(importlib.import_module(f"trainer.{module}"), thing)
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(f"{module}.{thing}")
    assert missing == []
