"""Settings that reduce memory: in which order they are switched on, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.runs import plan_config as config

from trainer.config import ConfigError, plain
from trainer.memory.planner import Planner
from trainer.memory.savings import fit, fit_vram, savings


@pytest.fixture(scope="module")
def planned():
    return Planner()


def fake(c):
    """A plan whose total is easily added up: 8 GB for each sample of a micro-batch, less what is switched on."""
    total = 8 * c.batch_size - 4 * c.gradient_checkpointing_vae - 2 * c.gradient_checkpointing_denoiser
    return SimpleNamespace(total=total * 10**9, moment="VAE decoder")


def test_fitting_switches_on_no_more_than_it_must_and_keeps_what_was_given():
    found, added, _ = fit(config(), 12.5, [], fake)
    assert added == ["--gradient_checkpointing_vae=true"] and found.gradient_checkpointing_vae and not found.gradient_checkpointing_denoiser
    found, added, _ = fit(config(batch_size=4), 10.5, ["gradient_checkpointing_vae", "batch_size"], fake)
    assert added == ["--gradient_checkpointing_denoiser=true", "--batch_size=1 --gradient_accumulation_steps=4"]
    assert not found.gradient_checkpointing_vae and found.batch_size * found.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match=r"vram = 1: this run takes at least 2.0 GB, with .*; reduce image_size"):
        fit(config(), 1, [], fake)
    with pytest.raises(ConfigError, match="--gradient_checkpointing_vae=true would help too, but the config sets otherwise"):
        fit(config(), 1, ["gradient_checkpointing_vae"], fake)


def test_checkpoints_make_it_less_and_are_offered(planned):
    before = planned(config())
    saved = {saving.flag: saving.bytes for saving in savings(config(), planned)}
    assert saved["--gradient_checkpointing_vae=true"] == before.total - planned(config(gradient_checkpointing_vae=True)).total > 0
    assert all(size > before.total / 100 for size in saved.values())


def test_full_fine_tuning_is_never_offered_bfloat16(planned):
    flags = [saving.flag for saving in savings(config(tune="full"), planned)]
    assert "--gradient_checkpointing_vae=true" in flags and "--model_options.dtype=bfloat16" not in flags


def test_vram_changes_the_run_and_resuming_keeps_it(planned, tmp_path, capsys):
    c = config(out=str(tmp_path))
    limit = (planned(c).total + planned(config(gradient_checkpointing_vae=True)).total) / 2e9
    fitted = fit_vram(replace(c, vram=limit), [], planned)
    assert fitted.gradient_checkpointing_vae and "--gradient_checkpointing_vae=true" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(plain(fitted)))
    assert fit_vram(replace(c, vram=limit), [], planned, resume=True) == fitted
