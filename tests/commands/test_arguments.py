"""Bad input gets one line with the valid form, and help costs no import of what it does not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.__main__ import main
from trainer.commands import COMMANDS

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ["sample", "--prompt", "a", "--out", "x"]
EVALUATE = ["evaluate", "--lora", "a=x.safetensors", "--reward", "demo-proxy", "--prompts", __file__, "--out", "x"]
TRAIN = ["train", "--out=x"]

WRONG = [
    ([], "COMMAND"),
    (["paint"], "invalid choice: 'paint'"),
    (["sample", "--prompt", "a"], "--out"),
    (["sample", "--out", "x"], "no prompt: give --prompt TEXT or --prompts FILE"),
    ([*SAMPLE, "-n", "0"], "at least 1 image"),
    ([*SAMPLE, "-n", "many"], "invalid int value: 'many'"),
    ([*SAMPLE, "--steps", "0"], "steps = 0: give at least 1"),
    ([*SAMPLE, "--guidance-scale", "nan"], "guidance_scale = nan"),
    ([*SAMPLE, "--strength", "nan"], "--strength: nan: give a finite number"),
    ([*SAMPLE, "--lora", "none.safetensors"], "no LoRA file none.safetensors"),
    ([*SAMPLE, "--lora", "none.safetensors:0.8"], "no LoRA file none.safetensors"),
    ([*SAMPLE, "--base-lora", "none.safetensors:nan"], "none.safetensors:nan: give a finite strength"),
    ([*SAMPLE, "--tuned-prompt", "{prompt}, x"], "--tuned-prompt is of the tuned part: give --lora or --tuned-model"),
    ([*SAMPLE, "--tuned-parts", "x"], "--tuned-parts is of a tuned model: give --tuned-model PATH"),
    ([*SAMPLE, "--tuned-model", "x", "--tuned-negative", "blurred"], "give --tuned-guidance-scale above 1"),
    ([*SAMPLE, "--negative", "blurred", "--guidance-scale", "1"], "give --guidance-scale above 1"),
    ([*SAMPLE, "--colour", "red"], "unknown argument --colour; see `python -m trainer sample --help`"),
    ([*SAMPLE, "--dtype", "float8"], "dtype = 'float8': use one of float32, bfloat16"),
    ([*SAMPLE, "--device", "gpu"], "device = gpu: use cpu, cuda, mps or xpu"),
    ([*SAMPLE, "--device=cuda"], "device = cuda: this machine"),
    ([*EVALUATE, "--device", "gpu"], "device = gpu: use cpu, cuda, mps or xpu"),
    ([*EVALUATE, "--device=cuda"], "device = cuda: this machine"),
    ([*EVALUATE, "--lora", "a=y.safetensors"], "two models are called a: give --lora NAME=FILE"),
    ([*EVALUATE, "--lora", "base=y.safetensors"], "two models are called base: give --lora NAME=FILE"),
    ([*EVALUATE, "--lora", "runs/lr=1/y.safetensors"], "no LoRA file"),
    ([*EVALUATE, "--lora", "y.safetensors", "--lora", "./y.safetensors"], "y.safetensors is given twice"),
    ([*EVALUATE, "--lora", "=y.safetensors"], "--lora =y.safetensors: give NAME=FILE, or a file"),
    ([*EVALUATE, "--reward", "fid"], "--reward fid: the results have a figure of that name: write ./fid"),
    ([*EVALUATE, "--out", "."], ". is a folder: give a JSON file"),
    ([*EVALUATE, "--switches", "half"], "switch 'half': write a step (15)"),
    (["score", "none"], "no image folder none"),
    (["score", "none", "--reward", "best"], "unknown reward 'best'"),
    (["score", "none", "--device", "gpu"], "device = gpu: use cpu, cuda, mps or xpu"),
    (["score", "none", "--device=cuda"], "device = cuda: this machine"),
    (["rewards"], "ACTION"),
    (["rewards", "download", "best"], "unknown reward 'best'"),
    (["rewards", "calibrate", "clip", "none", "--device=gpu"], "device = gpu: use cpu, cuda, mps or xpu"),
    (["compare", "refl", "--out", "x", "--budget", "0"], "give at least 1 denoiser call"),
    (["convert", "a", "b", "--rank"], "--rank: expected one argument"),
    (["train"], "missing key 'out'"),
    (["train", "--plan", "--resume"], "missing key 'out'"),
    ([*TRAIN, "--learning_rat=1"], "unknown key 'learning_rat'; did you mean learning_rate?"),
    ([*TRAIN, "--rank=4"], "unknown key 'rank'; did you mean lora.rank?"),
    ([*TRAIN, "--lora.rnk=4"], "unknown key 'lora.rnk'; did you mean lora.rank?"),
    ([*TRAIN, "--objective.name=refl", "--objective.step=4"], "unknown key 'objective.step'; did you mean objective.steps?"),
    ([*TRAIN, "--zzz=4"], "unknown key 'zzz'; valid keys are allow_remote, batch_size,"),
    ([*TRAIN, "--resum"], "unknown argument --resum; did you mean --resume?"),
    ([*SAMPLE, "--step", "4"], "unknown argument --step; did you mean --steps?"),
    *(
        ([*c, "--resume", "--overwrite"], "--resume to continue, or --overwrite")
        for c in (TRAIN, EVALUATE, SAMPLE, ["score", "a"], ["demo"])
    ),
    (["train", "none.toml"], "no config file none.toml"),
    ([*TRAIN, "--device", "cuda"], "write --device=cuda: settings take an equals sign"),
    ([*TRAIN, "--compile"], "write --compile=VALUE: settings take an equals sign"),
    ([*TRAIN, "--device=gpu"], "device = gpu: use cpu, cuda, mps or xpu"),
    ([*TRAIN, "--device=cuda"], "device = cuda: this machine"),
    ([*TRAIN, "--learning_rate=nan"], "learning_rate = nan"),
    ([*TRAIN, "--lr=nan"], "learning_rate = nan"),
    ([*TRAIN, "--objective=refl"], "--objective.name="),
    ([*TRAIN, "--objective.name=best"], "'best': use one of refl, imagerefl"),
    ([*TRAIN, "--objective.name=refl", '--objective.positive=["two words"]'], "unknown key 'objective.positive'"),
    ([*TRAIN, "--watch.switch=half"], "switch 'half': write a step (15)"),
    ([*TRAIN, "--batch_size=many"], "batch_size = 'many'"),
    (TRAIN, "imagerefl trains on images with these settings: give `images`"),
    ([*TRAIN, "--objective.name=refl"], "nothing to train on: give `images`"),
    ([*TRAIN, "--objective.name=refl", "--prompts=none.txt"], "none.txt"),
    (
        [*TRAIN, "--objective.name=refl", "--prompts=" + __file__, "--model=none", "--watch.every=2"],
        "watch.every is set: name the held-out reward",
    ),
    (
        [*TRAIN, "--objective.name=refl", "--prompts=" + __file__, "--model=none", "--buckets=true"],
        "buckets = true: they are for `images`, `pairs` or `labels`",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "-")
def test_bad_input_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
    assert all(line.startswith("read ") for line in said.out.splitlines()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"), "CUDA error: an illegal memory access"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory: use fewer images at a time"),
        (MemoryError(), "out of memory: use fewer images at a time"),
    ],
)
def test_errors_of_a_device_are_one_line(error, line, monkeypatch, capsys):
    from trainer.commands import demo

    def fail(_):
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    from trainer.commands import demo

    def fail(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(demo, "run", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["demo"])


def test_a_step_is_a_switch_to_watch_with():
    from trainer.config import build, override
    from trainer.training.config import TrainConfig

    config = build(TrainConfig, override({}, ["--out=x", "--watch.switch=12"]))
    assert config.watch.switch == "12"


HEAVY = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "peft", "timm")
MODELS = HEAVY[1:]
FREE_OF = [
    (["--help"], HEAVY),
    (["demo", "--help"], HEAVY),
    (["compare", "--help"], HEAVY),
    *((command, MODELS) for command in (["train", "--help"], ["sample", "--help"], ["evaluate", "--help"], ["score", "--help"])),
    *((command, MODELS) for command in (["convert", "--help"], ["rewards", "--help"], ["rewards", "list"])),
    (["train", "--out=x", "--learning_rate=-1"], MODELS),
]
REPORT = """
import json, sys
from trainer.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(("arguments", "absent"), FREE_OF, ids=lambda value: " ".join(value) if value and value[0] not in HEAVY else "")
def test_a_command_imports_no_more_than_it_needs(arguments, absent, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", REPORT, *arguments], cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=True
    )
    imported = set(json.loads(ran.stderr.splitlines()[-1]))
    assert not imported & set(absent)


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_page_describes_every_argument(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    page = capsys.readouterr().out
    assert ended.value.code == 0 and COMMANDS[command] in page
    assert "%(" not in page and "None" not in page


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_it_runs_from_any_folder(arguments, tmp_path):
    (tmp_path / "nodes.py").write_text("raise SystemExit(3)")  # a name of ours in the user's folder
    command = [sys.executable, "-m", "trainer", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: python -m trainer") and not ran.stderr
