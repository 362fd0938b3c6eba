"""The makers' tools run: every stage of pretraining, distillation, and one seed of the results with its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from tools.embedded import claim, distil, guiding, pretrain, results, tables, turbo
from trainer.metrics.frontier import Curves

STAGES = ("vae", "latents", "decoder", "unet", "gallery", "samples", "reader", "proxy", "heldout", "extractor")


@pytest.mark.slow
def test_every_stage_of_pretraining_runs_and_resumes(tmp_path):
    for steps in (1, 2):
        for name in STAGES if steps == 1 else ("reader",):
            pretrain.STAGES[name](tmp_path, 0, steps)
    logged = [json.loads(line) for line in (tmp_path / "reader.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2] and all(0 < line["loss"] < 100 for line in logged)


def test_controls_of_guidance_take_two_calls_a_step(tmp_path):
    (tmp_path / "runs" / "diffusion-npo").mkdir(parents=True)
    (tmp_path / "runs" / "diffusion-npo" / "lora.safetensors").touch()
    mixes, files, strengths = guiding.controls([tmp_path])
    assert {label for label, _ in mixes} >= {"base at 3", "CHATS's guide, untrained", *files} and set(strengths.values()) == {4.0}
    assert {mix.calls([1.0, 0.5, 0.0]) for mix in mixes.values()} == {4}


@pytest.mark.slow
def test_distillation_moves_the_adapter(tmp_path, monkeypatch):
    real_images = distil.real_images
    monkeypatch.setattr(distil, "real_images", lambda n, seed: real_images(4, seed))
    lora = load_file(distil.distil(tmp_path, steps=2, batch=2))
    assert all(float(v.abs().max()) > 0 for k, v in lora.items() if k.endswith("lora_up.weight"))


@pytest.mark.full
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


@pytest.mark.full
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
    curves = Curves(record["points"])
    assert curves.lead(["refl 2"], ["refl 2"], "gold") == (0.0, 0.0, 0.0)


@pytest.mark.full
def test_base_to_turbo_counts_calls_and_draws_a_line_for_each_way(monkeypatch):
    monkeypatch.setattr(turbo, "ALONE", {turbo.BASE: (2, 4), turbo.LORA: (2,)})
    monkeypatch.setattr(turbo, "COMBINED", ((4, 2, 1),))
    found = turbo.measure(2, 2, 0)
    assert {row["name"]: row["calls"] for row in found["rows"]} == {
        **{"base alone, 2 steps": 4, "base alone, 4 steps": 8, "few-step LoRA alone, 2 steps": 2},
        "base for 3 of 4, LoRA for the last 1 of 2": 7,  # timesteps 751, 501, 251, 1 and 501, 1
    }
    assert all(low <= mean <= high for row in found["rows"] for mean, low, high in (row[key] for key in turbo.FIGURES))
    assert len(turbo.table(found).splitlines()) == 2 + 4
    panels = turbo.figure(found).axes
    assert [len(panel.containers) for panel in panels] == [3, 3]
