"""The report that someone with a card pastes: without one it says so, and its way through the commands works on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "large")
    import gpu_report

    return gpu_report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_it_says_so(report, capsys, tmp_path):
    assert report.main(["--out", str(tmp_path / "report.md")]) == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.full
def test_three_steps_give_planned_and_measured_memory(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "chosen", lambda: None)
    report.main(["--device", "cpu", "--planned", "demo", "--bench", "--out", str(tmp_path / "report.md")])
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| demo"))
    _, size, _, _, planned, measured, _, seconds = (cell.strip() for cell in row.strip("|").split("|"))
    assert size == "64² × 8" and float(seconds) > 0
    assert float(planned) == pytest.approx(float(measured), rel=0.25)  # a process's memory, libraries included


def test_a_section_that_fails_says_so_and_the_next_one_runs(report, tmp_path, monkeypatch):
    def breaks():
        raise RuntimeError("no room")

    monkeypatch.setattr(report, "sections", lambda arguments: [("First", breaks), ("Second", lambda: "a table")])
    report.main(["--device", "cpu", "--out", str(tmp_path / "report.md")])
    assert (tmp_path / "report.md").read_text() == "# GPU report\n\n## First\n\nfailed: no room\n\n## Second\n\na table\n"
