"""Reward weights: where they are found, what is refused, and how a file is known to be the one that was downloaded."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import run as parity
from tests.parity.clip import write_pickscore
from tests.parity.pixels import natural_images
from trainer.__main__ import main
from trainer.rewards.calibrate import measure, write
from trainer.rewards.files import WeightFile, download, find, weight_folders
from trainer.rewards.image_reward import word_pieces
from trainer.rewards.registry import REWARDS, WeightFolders, load
from trainer.rewards.weights import Placement, fill, read_state


@pytest.fixture
def pickscore(tmp_path):
    (tmp_path / "pickscore").mkdir()
    write_pickscore(tmp_path / "pickscore", parity.SMALL_CLIP)
    return tmp_path / "pickscore" / "model.safetensors"


def opened(path, name="pickscore"):
    return load(f"{name}@{path}", architecture=parity.SMALL_CLIP).reward


def score(reward):
    return reward(torch.stack(natural_images([(224, 224)])), ["a fox"])


class Bomb:
    """What a hostile pickle does when it is opened: write a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').write('ran')",))


@pytest.mark.parametrize("write_bomb", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["zip", "plain"])
@pytest.mark.parametrize("name", ["hpsv2.1", "mps"])
def test_a_pickle_that_would_run_code_is_refused_and_did_not_run(write_bomb, name, tmp_path):
    path = tmp_path / "weights.pth"
    write_bomb({"state_dict": {"a": torch.zeros(2)}, "x": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="was not opened: it is a pickle .* could run code.*; use .*safetensors"):
        opened(path, name)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused_with_the_name_of_the_safe_file(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(ValueError, match=r"use model.safetensors of RE-N-Y/mpsv1"):
        opened(tmp_path / "MPS_overall_checkpoint.pth", "mps")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("left", [0, 10, 5000])
def test_a_file_cut_short_is_said_to_be(suffix, left, pickscore, tmp_path):
    whole = tmp_path / ("whole" + suffix)
    save_file(load_file(pickscore), whole) if suffix == ".safetensors" else torch.save(load_file(pickscore), whole)
    cut = tmp_path / ("cut" + suffix)
    cut.write_bytes(whole.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"cut{suffix} cannot be read as a weight file, it may be truncated"):
        opened(cut)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_whatever_is_wrong_with_a_file_is_one_sentence(kind, tmp_path):
    """Bytes changed and files cut at random: torch's reader then raises errors of a dozen kinds."""
    whole, damaged = tmp_path / "whole", tmp_path / ("damaged.safetensors" if kind == "safetensors" else "damaged.pt")
    state = {f"layers.{i}.weight": torch.randn(4, 3) for i in range(3)}
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save({"state_dict": state}, whole, _use_new_zipfile_serialization=kind == "zip")
    rng, content = random.Random(0), whole.read_bytes()
    refused = 0
    for number in range(200):
        changed = bytearray(content if number % 2 else content[: rng.randrange(len(content))])
        for _ in range(number % 2 * 4):
            changed[rng.randrange(min(len(changed), 700))] = rng.randrange(256)
        damaged.write_bytes(bytes(changed))
        try:
            read_state(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            refused += 1
        else:
            assert number % 2, f"a file cut to {len(changed)} of {len(content)} bytes was read"
    assert refused > 100


def test_weights_of_another_model_are_refused_by_name_and_shape(pickscore, tmp_path):
    state = load_file(pickscore)
    save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less.safetensors belongs to another model: it lacks 1 weights \(visual.proj"):
        opened(tmp_path / "less.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"has 1 unknown weights \(extra"):
        opened(tmp_path / "more.safetensors")
    save_file({**state, "visual_projection.weight": torch.zeros(128, 99)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"visual.proj is \(99, 128\), not \(160, 128\)"):
        opened(tmp_path / "odd.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not a state dict: its values must be tensors"):
        opened(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        opened(tmp_path / "none.safetensors")


def test_order_prefix_half_precision_and_position_ids_do_not_matter(pickscore, tmp_path):
    state = load_file(pickscore)
    expected = score(opened(pickscore))
    other = {f"model.{k}": v for k, v in reversed(state.items())}
    other["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(other, tmp_path / "other.pt")
    torch.testing.assert_close(score(opened(tmp_path / "other.pt")), expected)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, tmp_path / "half.pt")
    torch.testing.assert_close(score(opened(tmp_path / "half.pt")), expected, rtol=2e-2, atol=0.2)


def test_a_temperature_keeps_its_digits_in_half_precision(pickscore):
    exact = float(load_file(pickscore)["logit_scale"].exp())
    for name in ("pickscore", "mps"):
        assert name in REWARDS
    half = load(f"pickscore@{pickscore}", dtype=torch.bfloat16, architecture=parity.SMALL_CLIP).reward
    assert half.scale == pytest.approx(exact, rel=1e-6) and half.visual.proj.dtype is torch.bfloat16


def test_another_vocabulary_is_refused(tmp_path):
    for number, text in enumerate(("<!DOCTYPE html>\n404\n", "the\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n")):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{number}.txt is not bert-base-uncased's vocabulary"):
            word_pieces(path)
    with pytest.raises(FileNotFoundError, match="needs bert-base-uncased's vocab.txt"):
        word_pieces(tmp_path / "none.txt")


def test_filling_never_leaves_a_weight_unset(tmp_path):
    module = fill(lambda: torch.nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path, Placement())
    assert not module.training and not any(p.requires_grad or p.is_meta for p in module.parameters())


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floats_are_refused(kind, tmp_path):
    state = {"weight": torch.ones(2, 3).to(kind), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match=f"^x.safetensors holds weight as {str(kind)[6:]}, which may be quantised: use a file of float16"):
        fill(lambda: torch.nn.Linear(3, 2), state, Path("x.safetensors"))


def test_weights_are_found_in_a_folder_of_the_rewards_name_or_under_an_unmistakable_one(tmp_path):
    hps, pick = REWARDS["hpsv2.1"].files["weights"], REWARDS["pickscore"].files["weights"]
    assert find("hpsv2.1", hps, [tmp_path]) is None
    (tmp_path / "HPS_v2.1_compressed.pt").touch()
    assert find("hpsv2.1", hps, [tmp_path / "no", tmp_path]) == tmp_path / "HPS_v2.1_compressed.pt"
    (tmp_path / "HPS_v2.1_compressed.safetensors").touch()
    assert find("hpsv2.1", hps, [tmp_path]).suffix == ".safetensors"
    (tmp_path / "model.safetensors").touch()  # anybody's
    assert find("pickscore", pick, [tmp_path]) is None
    (tmp_path / "pickscore").mkdir()
    (tmp_path / "pickscore" / "model.safetensors").touch()
    assert find("pickscore", pick, [tmp_path]) == tmp_path / "pickscore" / "model.safetensors"


def test_comfyuis_folder_comes_before_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    found = weight_folders([tmp_path / "mine"])
    assert found[0] == tmp_path / "mine" and tmp_path / "models" / "rewards" in found[:-1] and ".cache" in str(found[-1])


def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs HPS_v2.1_compressed.pt: run `python -m trainer rewards download hpsv2.1`"):
        load("hpsv2.1", folders=WeightFolders([tmp_path]))


# -- download --------------------------------------------------------------------------------------------------------

FILE = WeightFile("someone/model", "sub/weights.bin")


@pytest.fixture
def hub(monkeypatch):
    """A hub whose one file is `content`."""
    import huggingface_hub

    served = SimpleNamespace(content=b"first", asked=[])

    def fetch(repository, path, revision, local_dir):
        served.asked.append((repository, path, revision))
        target = local_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(served.content)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: SimpleNamespace(commit_hash="abc123"))
    return served


def test_a_download_records_revision_and_hash_and_is_verified_after(hub, tmp_path):
    path = download("mine", FILE, tmp_path)
    assert path == tmp_path / "mine" / "weights.bin" and path.read_bytes() == b"first"
    record = json.loads((tmp_path / "mine" / "weights.bin.json").read_text())
    assert record["revision"] == "abc123" and record["sha256"].startswith("a7937b64b8caa58f")
    assert hub.asked == [("someone/model", "sub/weights.bin", "abc123")]
    download("mine", FILE, tmp_path)
    assert len(hub.asked) == 1  # verified, not fetched again
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed since it was downloaded"):
        download("mine", FILE, tmp_path)


def test_other_content_under_the_same_name_is_refused(hub, tmp_path):
    download("mine", FILE, tmp_path).unlink()
    hub.content = b"second"
    with pytest.raises(ValueError, match="someone/model now has another sub/weights.bin"):
        download("mine", FILE, tmp_path)
    assert not (tmp_path / "mine" / "weights.bin").exists()


def test_a_changed_file_is_not_loaded(pickscore):
    pickscore.with_name("model.safetensors.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="has changed since it was downloaded"):
        load("pickscore", folders=WeightFolders([pickscore.parent.parent]), architecture=parity.SMALL_CLIP)


def test_loading_never_fetches(hub, tmp_path):
    with pytest.raises(FileNotFoundError):
        load("mps", folders=WeightFolders([tmp_path]))
    assert not hub.asked


def test_an_unreachable_hub_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(url):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(ValueError, match="cannot download sub/weights.bin of someone/model: no route$"):
        download("mine", FILE, tmp_path)


# -- the command -----------------------------------------------------------------------------------------------------


def test_list_shows_licence_source_and_what_is_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    (tmp_path / "models" / "rewards").mkdir(parents=True)
    (tmp_path / "models" / "rewards" / "HPS_v2.1_compressed.pt").touch()
    assert main(["rewards", "list"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, entry in REWARDS.items():
        assert entry.licence in lines[name] and entry.source in lines[name]
    files = {f for entry in REWARDS.values() for f in entry.files.values()}
    assert all(
        f.read_at and (f.revision == "main" or (re.fullmatch("[0-9a-f]{40}", f.revision) and f.revision in f.read_at)) for f in files
    )
    assert all(f.revision[:12] in out and f.read_at in out for f in files)
    assert " here " in lines["hpsv2.1"] and "missing" in lines["pickscore"] and " here " in lines["compressibility"]


def test_download_command_fetches_every_file_of_the_reward(hub, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert main(["rewards", "download", "aesthetic"]) == 0
    assert {asked[0] for asked in hub.asked} == {"trl-lib/ddpo-aesthetic-predictor", "timm/vit_large_patch14_clip_224.openai"}
    assert (tmp_path / "models" / "rewards" / "aesthetic" / "aesthetic-model.pth").is_file()
    assert main(["rewards", "download", "dino"]) == 0
    assert hub.asked[-1][0] == "facebook/dino-vits16" and (tmp_path / "models" / "rewards" / "dino" / "pytorch_model.bin").is_file()
    assert main(["rewards", "download", "compressibility"]) == 2
    assert "needs no weights" in capsys.readouterr().err
    assert main(["rewards", "download", "best"]) == 2
    assert "unknown reward 'best'" in capsys.readouterr().err


def test_calibration_makes_a_reward_of_ones_own_standard(image_folder, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert main(["rewards", "calibrate", str(mine), str(image_folder)]) == 0
    part = load(str(mine))
    from trainer.data import images as pictures

    values = torch.stack([pictures.load(p, 64) for p in pictures.find(image_folder)]).mean((1, 2, 3))
    assert part.mean == pytest.approx(float(values.mean()), abs=1e-5) and part.std == pytest.approx(float(values.std()), rel=1e-4)
    assert "8 images" in capsys.readouterr().out


def test_statistics_of_equal_scores_are_refused(tmp_path):
    assert measure([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item()), 3)
    with pytest.raises(ValueError, match="3 images with equal scores"):
        measure([2.0, 2.0, 2.0])
    write(tmp_path / "pickscore" / "statistics.json", 20.0, 2.0, 9)
    folders = WeightFolders([tmp_path / "empty", tmp_path])
    assert folders.read_statistics("pickscore") == (20.0, 2.0) and folders.read_statistics("mps") is None
    assert folders.statistics("mps") == tmp_path / "empty" / "mps" / "statistics.json"
    assert folders.statistics("mps@/x/y.safetensors").as_posix() == "/x/y.statistics.json"
    with pytest.raises(ValueError, match="statistics of demo-proxy cannot be stored"):
        folders.statistics("demo-proxy")


def test_measured_statistics_of_a_reward_folder_replace_those_it_came_with(reward_folder, tmp_path):
    import shutil

    folder = shutil.copytree(reward_folder, tmp_path / "tower")
    write(WeightFolders().statistics(str(folder)), 3.0, 2.0, 9)
    assert (load(str(folder)).mean, load(str(folder)).std) == (3.0, 2.0)


def test_files_are_read_without_running_anything(pickscore):
    assert read_state(pickscore).keys() == load_file(pickscore).keys()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_weight_that_is_not_finite_is_refused_with_its_name(kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    state = {"good.weight": torch.ones(3), "bad.weight": torch.tensor([1.0, float("nan")])}
    save_file(state, file) if kind == "safetensors" else torch.save({"state_dict": state}, file)
    with pytest.raises(ValueError, match=rf"^{file} is damaged: bad.weight has values that are not finite$"):
        read_state(file)
