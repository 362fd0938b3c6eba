"""The Trade-off Sweep inside a real ComfyUI, with one prompt and with several."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def sweep(request, tmp_path_factory):
    return run_inside(request.param, "sweep.py", cwd=tmp_path_factory.mktemp("sweep"))


def numbers(cell):
    """`-0.5 to 1.2` -> the two."""
    return [float(part) for part in cell.split(" to ")]


@comfyui
@pytest.mark.slow
def test_one_prompt_equals_the_stock_sampler_and_has_the_standard_error_of_its_rewards_alone(sweep):
    assert sweep["one prompt"] == [[1, 196, 196, 3], [1, 600, 900, 3], [9, 64, 64, 3]]
    assert sweep["k = T against the stock sampler"] < 1e-4
    # the first columns are those of earlier versions
    assert sweep["header of one prompt"] == ["switch at step", "reward", "held-out", "diversity", "reward, ± 1 s.e.", "held-out, ± 1 s.e."]
    found = [numbers(row[4]) for row in sweep["rows of one prompt"]]
    assert found == [pytest.approx(pair, abs=1e-3) for pair in sweep["one prompt's bounds, by the scorer"]]
    assert "intervals need several prompts" in sweep["caption of one prompt"]


@comfyui
@pytest.mark.slow
def test_a_schedule_of_the_tuned_part_equals_stock_and_combined_sampling(sweep):
    """At k = 0 the stock sampler of the tuned part, in the middle the Combined KSampler, at k = T the base as before."""
    assert sweep["equal schedules"] and sweep["own schedule's effect"] > 1e-2
    alone, middle, base = sweep["own schedule, at k = 0, in the middle and at k = T"]
    assert max(alone, middle) < 1e-4 and base == 0.0


@comfyui
@pytest.mark.slow
def test_every_prompt_is_drawn_as_alone_with_the_same_seeds(sweep):
    assert sweep["several prompts"] == [[1, 2 * 66 - 2, 9 * 66 - 2, 3], [18, 64, 64, 3]]  # 2 switches; 3 prompts × 3 seeds
    assert sweep["against runs of one prompt"] == 0.0


@comfyui
@pytest.mark.slow
def test_the_base_is_measured_too_and_costs_no_tuned_evaluation(sweep):
    """Six steps, switches 0 and 3: 6 of the base and 6 + 3 of the tuned model for each of three prompts."""
    assert sweep["progress"] == [45, [45]]
    assert [row[0] for row in sweep["rows"]] == ["0", "3", "6"]
    # each evaluation asks twice: for the scale of guidance, and where the network is called
    assert sweep["tuned evaluations"] == sweep["tuned evaluations, the base in the list"] > 0


@comfyui
@pytest.mark.slow
def test_the_table_has_means_over_prompts_and_intervals(sweep):
    figures = ["reward", "held-out", "diversity"]
    assert sweep["header"] == ["switch at step", *figures, *(f"{f}, 95 %" for f in figures), *(f"{f} − base, 95 %" for f in figures)]
    assert sweep["caption"] == "3 prompts × 3 seeds. Bars: 95 % interval of the difference to the base, bootstrap over prompts."
    assert [numbers(cell) for cell in sweep["rows"][2][7:]] == [[0.0, 0.0]] * 3
    for row, own, proxy in zip(sweep["rows"], sweep["diversity of each prompt, by its node"], sweep["proxy of each prompt, by the scorer"]):
        assert float(row[3]) == pytest.approx(sum(own) / 3, abs=1e-3)
        assert float(row[1].split(" ± ")[0]) == pytest.approx(sum(proxy) / 3, abs=1e-3)
        for cell, values in ((row[4], proxy), (row[6], own)):
            low, high = numbers(cell)
            assert min(values) - 1e-3 <= low < sum(values) / 3 < high <= max(values) + 1e-3


@comfyui
@pytest.mark.slow
def test_intervals_of_forty_prompts_agree_with_the_normal_distribution(sweep):
    assert len(sweep["bounds by the normal distribution"]) == len(sweep["bounds"]) == 6
    for name, pairs in sweep["bounds by the normal distribution"].items():
        for found, expected in zip(sweep["bounds"][name], pairs):
            assert found == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0])), name


@comfyui
@pytest.mark.slow
def test_the_plot_marks_the_base_and_has_bars_in_both_axes(sweep):
    """For each reward the bars along diversity, then those along reward: of k = 12, then of the base, which does not differ from itself."""
    bases = sweep["bases"]
    assert sweep["stars"] == [pytest.approx(base, abs=1e-6) for base in bases]
    for i, name in enumerate(("reward", "held-out")):
        x, y = sweep["points"][i]
        for axis, figure in enumerate(("diversity", name)):
            first, last = sweep["bars"][2 * i + axis]
            low, high = (bases[i][axis] + bound for bound in sweep["bounds"][f"{figure} − base"][0])
            assert [*first[0], *first[1]] == pytest.approx([low, y, high, y] if axis == 0 else [x, low, x, high], abs=1e-5)
            assert [*last[0], *last[1]] == pytest.approx(bases[i] * 2, abs=1e-5)
    assert sweep["labels"] == ["base", "k=12"]


@comfyui
@pytest.mark.slow
def test_bad_input_gets_a_sentence(sweep):
    expected = {
        "lines without clip": "2 lines of prompt without a clip: connect clip",
        "neither": "connect clip, which encodes each line of prompt, or positive",
        "both": "disconnect positive",
        "blank": "write one per line",
        "switches beyond": "from 0 to 6",
    }
    assert sweep["refused"].keys() == expected.keys()
    for name, message in expected.items():
        assert message in sweep["refused"][name], (name, sweep["refused"][name])
