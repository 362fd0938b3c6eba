"""What a file depends on is recorded by hash; other weights under the same name are refused, and the earlier ones resume by path."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from helpers.runs import settings
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.lora.file import read_metadata
from trainer.rewards.registry import weights_hashes
from trainer.runtime.files import check_weights
from trainer.training import checkpoint


def retrain(folder):
    """Change one weight of a reward folder."""
    state = load_file(folder / "model.safetensors")
    name = next(iter(state))
    save_file({**state, name: state[name] + 1e-3}, folder / "model.safetensors")


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_reward_is_known_by_the_hash_of_its_files(reward_folder, tmp_path):
    python = tmp_path / "mine.py"
    python.write_text("def reward(images, prompts): ...")
    assert weights_hashes(str(python)) == {str(python): sha(python)}
    of_folder = "".join(sha(reward_folder / name) for name in ("config.json", "model.safetensors", "merges.txt.gz"))
    assert weights_hashes(str(reward_folder)) == {str(reward_folder): hashlib.sha256(of_folder.encode()).hexdigest()}
    assert weights_hashes("compressibility") == {}
    both = weights_hashes(f"demo-proxy=1, {python}=0.5, demo-heldout=2")
    assert list(both) == ["demo-proxy", str(python), "demo-heldout"] and len(set(both.values())) == 3
    copy = tmp_path / "copy"
    shutil.copytree(reward_folder, copy)
    assert weights_hashes(str(copy))[str(copy)] == weights_hashes(str(reward_folder))[str(reward_folder)]
    retrain(copy)
    assert weights_hashes(str(copy))[str(copy)] != weights_hashes(str(reward_folder))[str(reward_folder)]


def test_other_weights_name_both_hashes_and_no_record_warns(tmp_path, caplog):
    check_weights(tmp_path, {"a": "1" * 64}, {"a": "1" * 64, "new": "3" * 64}, "")
    with pytest.raises(ValueError, match=f"other weights of a: sha256 {'1' * 12}, now {'2' * 12}; do this"):
        check_weights(tmp_path, {"a": "1" * 64}, {"a": "2" * 64}, "do this")
    assert not caplog.records
    check_weights(tmp_path, None, {"a": "2" * 64}, "")
    assert caplog.text.count("\n") == 1 and "records no hash of its weights" in caplog.text


@pytest.mark.slow
def test_a_checkpoint_resumes_with_its_own_rewards_alone(pipeline_folder, reward_folder, image_folder, tmp_path, capsys, caplog):
    reward, earlier = tmp_path / "reward", tmp_path / "earlier"
    for copy in (reward, earlier):
        shutil.copytree(reward_folder, copy)
    run = tmp_path / "run"

    def train(steps, *flags, of=reward):
        return main(["train", *settings(pipeline_folder, of, image_folder, run, steps=steps), *flags])

    assert train(2) == 0
    recorded = checkpoint.load(run / "checkpoint.pt")["weights"]
    assert recorded == {"reward": weights_hashes(str(reward))} == read_metadata(run / "lora.safetensors")["weights"]
    before = recorded["reward"][str(reward)]
    retrain(reward)
    now = weights_hashes(str(reward))[str(reward)]
    assert train(3, "--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bars
    assert error.startswith("error: ") and error.endswith("--reward=PATH"), error
    assert f"other weights of {reward}: sha256 {before[:12]}, now {now[:12]}; to go on with the earlier ones" in error
    assert train(3, "--resume", of=earlier) == 0  # another name, the same weights
    assert checkpoint.load(run / "checkpoint.pt")["step"] == 3
    (tmp_path / "third").mkdir()
    shutil.copytree(reward, tmp_path / "third" / "reward")
    assert train(4, "--resume", of=tmp_path / "third" / "reward") == 2
    assert "was written with another reward" in capsys.readouterr().err

    state = checkpoint.load(run / "checkpoint.pt")
    del state["weights"]  # as 0.2.0 wrote it
    checkpoint.save(state, run / "checkpoint.pt")
    caplog.clear()
    assert train(4, "--resume", of=earlier) == 0
    assert "records no hash of its weights" in caplog.text


@pytest.mark.slow
def test_a_score_journal_is_continued_with_its_own_rewards_alone(reward_folder, image_folder, tmp_path, capsys):
    reward, out = tmp_path / "reward", tmp_path / "scores.csv"
    shutil.copytree(reward_folder, reward)
    command = ["score", str(image_folder), "--reward", str(reward), "--out", str(out), "--raw"]
    journal = out.with_name("scores.csv.0.partial")
    then = weights_hashes(str(reward))
    first = {"rewards": [str(reward)], "size": 0, "prompt": None, "prompt column": "", "weights": then}
    journal.write_text(json.dumps(first) + "\n")
    retrain(reward)
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    now = weights_hashes(str(reward))[str(reward)]
    assert f"sha256 {then[str(reward)][:12]}, now {now[:12]}; delete it to score again" in error and "--reward PATH" in error
    del first["weights"]
    journal.write_text(json.dumps(first) + "\n")
    assert main([*command, "--resume"]) == 0 and out.is_file()


@pytest.mark.slow
def test_a_finished_method_of_other_rewards_is_not_compared(tmp_path, monkeypatch):
    from trainer.demo import experiment

    lora = tmp_path / "lora.safetensors"
    weights = {"reward": {"demo-proxy": "1" * 64}, "watch.heldout": {"demo-heldout": "2" * 64}}
    base = experiment.file_hash(experiment.UNET)
    config = experiment.train_config(tmp_path, "refl", experiment.LATE, 1e-3, every=1, watched=1, batch_size=1, seed=0, steps=1)
    made = {"base": base, "weights": weights, "settings": config.describe()}
    save_file({"x": torch.zeros(1)}, lora, metadata={"imagerefl": json.dumps(made)})
    experiment._check_finished(config, lora, weights)
    changed = {**weights, "watch.heldout": {"demo-heldout": "3" * 64}}
    with pytest.raises(ValueError, match=f"demo-heldout: sha256 {'2' * 12}, now {'3' * 12}; give another --out"):
        experiment._check_finished(config, lora, changed)
