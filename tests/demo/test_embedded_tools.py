"""The makers' tools run: every stage of pretraining, distillation, and one seed of the results with its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from tools.embedded import claim, distil, pretrain, results, tables, verdict

STAGES = ("vae", "latents", "decoder", "unet", "gallery", "samples", "reader", "proxy", "heldout", "extractor")


@pytest.mark.slow
def test_every_stage_of_pretraining_runs_and_resumes(tmp_path):
    for steps in (1, 2):
        for name in STAGES if steps == 1 else ("reader",):
            pretrain.STAGES[name](tmp_path, 0, steps)
    logged = [json.loads(line) for line in (tmp_path / "reader.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2] and all(0 < line["loss"] < 100 for line in logged)


@pytest.mark.slow
def test_distillation_moves_the_adapter(tmp_path, monkeypatch):
    real_images = distil.real_images
    monkeypatch.setattr(distil, "real_images", lambda n, seed: real_images(4, seed))
    lora = load_file(distil.distil(tmp_path, steps=2, batch=2))
    assert all(float(v.abs().max()) > 0 for k, v in lora.items() if k.endswith("lora_up.weight"))


@pytest.mark.slow
def test_a_seed_of_the_results_has_every_baseline_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FULL", replace(results.FULL, real=4))
    monkeypatch.setattr(results, "EVERY", 1)
    found = results.run_seed(tmp_path / "seed0", 0, results.Size(updates=1, batch=2, prompts=2, per_prompt=2))
    models = {p["model"] for p in found["points"]}
    baselines = {"refl at 25 %", "refl at 50 %", "refl at 75 %", "refl stopped early"}
    assert models == {"refl", "imagerefl", *baselines, "refl after the unguided base", "imagerefl after the unguided base"}
    (tmp_path / "seed0" / "results.json").write_text(json.dumps(found))
    tables.write([tmp_path / "seed0"], tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text("utf-8")
    assert "| ReFL at 25 % | 0 | +" in text.replace("| -", "| +") and "| ReFL against the base: held-out |" in text


@pytest.mark.slow
def test_a_seed_of_the_claim_is_trained_judged_and_continues_after_a_stop(tmp_path, monkeypatch):
    for name, value in (
        ("REAL", 4),
        ("BATCH", 2),
        ("UPDATES", 2),
        ("CHECKPOINTS", (1, 2)),
        ("PROMPTS", 2),
        ("PER_PROMPT", 2),
        ("CHUNK", 2),
    ):
        monkeypatch.setattr(claim, name, value)
    arms = {"refl": replace(claim.ARMS["refl"], updates=2, checkpoints=(1, 2))}
    add, stopped = claim.Study.add, []

    def once(study, part, images):
        if part.number == 1 and not stopped:
            stopped.append(part.number)
            raise KeyboardInterrupt
        add(study, part, images)

    monkeypatch.setattr(claim.Study, "add", once)
    with pytest.raises(KeyboardInterrupt):
        claim.run(tmp_path, arms, 0, (0.5,))
    record = claim.run(tmp_path, arms, 0, (0.5,))
    monkeypatch.setattr(claim.Study, "add", add)
    assert record == claim.run(tmp_path / "again", arms, 0, (0.5,))
    expected = {"base|0", "base_unguided|20", "refl 2 at 50 %|0"}
    assert set(record["points"]) == expected | {f"refl 2|{k}" for k in claim.SWITCHES} | {f"refl 1|{k}" for k in claim.FEW_SWITCHES}
    assert all(len(row["gold"]) == 2 for row in record["points"].values())
    curves = verdict.Curves(record)
    assert curves.lead(["refl 2"], ["refl 2"], "gold") == (0.0, 0.0, 0.0)


def _record(gains, shares, prompts=8):
    """A record in which every prompt has the same figures; gains and shares by model and switch."""
    points = {"base|0": (0.0, 1.0)}
    for model, values in gains.items():
        points |= {f"{model}|{k}": (gain, shares[model][i]) for i, (k, gain) in enumerate(values.items())}
    axes = ("heldout", "gold", "reward")
    return {
        "seed": 0,
        "points": {
            name: {**{a: [gain] * prompts for a in axes}, "diversity": [0.5 * share] * prompts, "match": [1.0] * prompts}
            for name, (gain, share) in points.items()
        },
    }


def test_the_best_gain_at_a_share_of_diversity_lies_on_lines_between_switches():
    assert verdict.best_gain([(0.5, 2.0), (0.9, 1.0), (1.0, 0.0)], 0.85) == pytest.approx(1.0 + 0.05 / 0.4)
    assert verdict.best_gain([(0.9, 2.0), (0.95, 1.0), (1.0, 0.0)], 0.85) == 2.0  # never below: the highest point
    assert verdict.best_gain([(0.5, -1.0), (0.9, -0.5), (1.0, 0.0)], 0.85) == 0.0  # nothing better than the base


def test_leads_and_equal_proxy_follow_the_curves_by_hand():
    record = _record({"a": {0: 2.0, 12: 1.0}, "b": {0: 1.6, 12: 1.2}}, {"a": (0.5, 0.9), "b": (0.6, 0.95)})
    curves = verdict.Curves(record)
    theirs, ours = 1.0 + 0.05 / 0.4, 1.2 + 0.10 / 0.35 * 0.4
    assert curves.lead(["b"], ["a"], "gold") == pytest.approx((ours - theirs,) * 3)
    equal = curves.at_equal_proxy("b", "a", 12)  # b has a's proxy of 1.0 a sixth of the way from k = 12 to the base
    assert equal["gold"] == pytest.approx(0.0) and equal["diversity"] == pytest.approx(0.95 + 0.05 / 6 - 0.9)


@pytest.mark.parametrize(
    ("interval", "seeds", "word"),
    [
        ((0.2, 0.1, 0.3), 5, "true"),
        ((-0.2, -0.3, -0.1), 5, "false"),
        ((0.0, -0.05, 0.05), 5, "no difference"),
        ((0.1, -0.05, 0.3), 5, "undecided"),
        ((0.2, 0.1, 0.3), 4, "undecided (n = 4)"),
    ],
)
def test_the_verdict_is_the_protocols(interval, seeds, word):
    leads = {axis: [interval] * seeds for axis in verdict.CO_PRIMARY}
    assert verdict.decide(leads) == word
    if word == "true":
        leads["gold"][2] = (0.1, -0.01, 0.3)
        assert verdict.decide(leads) == "undecided"
