"""`sample --optimise-noise` on the embedded model."""

import csv
import shutil

import pytest
import torch

from trainer.__main__ import _parse, main
from trainer.commands import sample
from trainer.commands.chain import Chain
from trainer.commands.options import generation_of, policy_of
from trainer.data import images
from trainer.demo.files import CONSISTENCY
from trainer.generate import Generation
from trainer.guidance import Slot, cfg
from trainer.memory.dry_run import MemoryTracker
from trainer.memory.noise_gradient import gradient_bytes
from trainer.memory.plan import allowance
from trainer.memory.planner import meta_reward
from trainer.models.open import EMBEDDED, open_policy
from trainer.noise.images import NoiseOptimiser, terms
from trainer.noise.settings import optimisation_of
from trainer.rewards.registry import load_reward
from trainer.rng import Rng

PROMPT = "a large red star on a black background, crisp, vivid"


@pytest.fixture(scope="module")
def opened():
    """The embedded model, loaded once."""
    found = []
    return lambda args: found[0] if found else found.append(policy_of(args)) or found[0]


@pytest.fixture(autouse=True)
def _one_model(opened, monkeypatch):
    monkeypatch.setattr(sample, "policy_of", opened)


def run(out, *more):
    return main(["sample", "--prompt", PROMPT, "-n", "1", "--steps", "2", "--guidance-scale", "1", "--out", str(out), *map(str, more)])


def test_the_first_image_is_plain_samplings_and_the_kept_one_is_better(tmp_path, capsys):
    given = ("--optimise-noise", "reno", "--reward", "demo-proxy", "--heldout", "demo-heldout", "--noise-iterations", 4)
    assert run(tmp_path / "plain") == 0 and run(tmp_path / "best", *given) == 0
    said = capsys.readouterr().out
    assert "reno: predicted peak memory" in said and "reno: 26 model calls, 4 decodes, 4 reward calls an image" in said
    rows = list(csv.DictReader((tmp_path / "best-noise" / "00000.csv").open()))
    kept = next(row for row in rows if row["kept"] == "1")
    assert len(rows) == 4 and float(kept["reward"]) > float(rows[0]["reward"]) and kept["heldout"] and not rows[0]["heldout"]
    plain = load_reward("demo-proxy", True)(images.load(tmp_path / "plain" / "00000.png", (64, 64))[None], [PROMPT])
    assert float(plain) == pytest.approx(float(rows[0]["reward"]), abs=0.02)  # of 8-bit pixels
    (tmp_path / "best" / "00000.png").rename(tmp_path / "before.png")
    assert run(tmp_path / "best", *given, "--resume") == 0
    assert (tmp_path / "best" / "00000.png").read_bytes() == (tmp_path / "before.png").read_bytes()
    assert run(tmp_path / "best", *given[:-1], 5, "--resume") == 2 and "another optimise_noise" in capsys.readouterr().err


def test_the_gradient_is_autograds_and_its_memory_as_predicted():
    """Against one pass without recomputation, and the live bytes of a real iteration."""
    policy, reward = open_policy("demo"), load_reward("demo-proxy", True)
    settings, one = Generation(steps=2, method="ddim", seed=3), optimisation_of("reno", {"iterations": 2, "clip": 1e6, "norm_weight": 0.0})
    noise, sigmas = Rng(3, 0, (0,)).start_noise(policy.latent_shape), policy.sigmas(2)
    z = noise.clone().requires_grad_(True)
    denoise = policy.denoiser([PROMPT], adapter="base", guidance_scale=3.0)
    x = z * (1 + sigmas[0].square()).sqrt()
    first = denoise(x, sigmas[:1])
    x = first + sigmas[1] * (x - first) / sigmas[0]
    (expected,) = torch.autograd.grad(-reward(policy.decode(denoise(x, sigmas[1:2])), [PROMPT]).sum(), z)
    policy.gradient_checkpointing(denoiser=True, vae=True)
    seen = []

    class Seeing(NoiseOptimiser):
        def _parts(self, noise, prompt, rng):
            seen.append(noise.detach().clone())
            return super()._parts(noise, prompt, rng)

    tracker = MemoryTracker(torch.device("cpu"))
    tracker.attribute([p for m in (policy.network, policy.vae, *policy.prompts.encoders, reward) for p in m.parameters()], "weights")
    with tracker, tracker.phase("iteration"):
        Seeing(policy, cfg(Slot("base", 3.0)), sigmas, settings, one, terms(reward))(PROMPT)
    moved = (seen[0] - seen[1]) / (5.0 * 1.9)
    assert float((moved - expected).norm() / expected.norm()) < 1e-3
    measured = tracker.phases["iteration"].bytes
    found = gradient_bytes(open_policy("demo", "meta"), meta_reward("demo-proxy"), settings, one, cfg(Slot("base", 3.0)), sigmas, "cpu")
    assert found == pytest.approx(measured + allowance(measured, "cpu"), rel=0.05)
    counted = (found - 0.9e9) / 1.05
    assert counted == pytest.approx(measured, rel=0.05)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another UNet of the embedded model."""
    return shutil.copytree(EMBEDDED / "unet", tmp_path_factory.mktemp("second") / "unet")


CHAINS = {
    "one model": ["--guidance-scale", 3],
    "base, then LoRA": ["--lora", CONSISTENCY, "--switch", 1, "--guidance-scale", 3],
    "RL guidance, two networks": ["--tuned-model", "SECOND", "--guide", "rl", "--guidance-scale", 3],
    "two networks, a part each": [
        "--tuned-model",
        "SECOND",
        "--tuned-steps",
        3,
        "--switch",
        1,
        "--tuned-guidance-scale",
        2,
        "--guidance-scale",
        1,
    ],
}


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.full) for name in list(CHAINS)[:3]), list(CHAINS)[3]])
def test_the_memory_of_a_chain_is_that_of_its_tensors(name, second, monkeypatch):
    """Live bytes of one iteration on the CPU, weights of every network and reward once, against the dry run without weights."""
    monkeypatch.setattr("trainer.memory.noise_gradient.allowance", lambda size, device: 0)
    more = [second if part == "SECOND" else part for part in CHAINS[name]]
    args = _parse(list(map(str, ["sample", "--prompt", PROMPT, "--out", "x", "--steps", 2, "--method", "ddim", *more])))
    settings = generation_of(args)
    chain = Chain.of(args, settings)
    one, planned = optimisation_of("reno", {"iterations": 2}), chain.on_meta(args)
    found = gradient_bytes(
        planned.policy,
        meta_reward("demo-proxy"),
        settings,
        one,
        planned.mix,
        planned.levels,
        "cpu",
        planned.models,
        [meta_reward("demo-heldout")],
    )
    steps, reward, heldout = chain.on(open_policy("demo")), load_reward("demo-proxy", True), load_reward("demo-heldout", True)
    tracker = MemoryTracker(torch.device("cpu"))
    networks = [each.network for each in (steps.policy, *steps.models.values())]
    for each in (steps.policy, *steps.models.values()):
        each.gradient_checkpointing(denoiser=True, vae=True)
    modules = (*networks, steps.policy.vae, *steps.policy.prompts.encoders, reward, heldout)
    tracker.attribute([p for m in modules for p in m.parameters()], "weights")
    with tracker, tracker.phase("iteration"):
        NoiseOptimiser(steps.policy, steps.mix, steps.levels, settings, one, terms(reward), steps.models)(PROMPT)
    assert len(planned.levels) == len(steps.levels) and torch.allclose(planned.levels, steps.levels)
    assert found == pytest.approx(tracker.phases["iteration"].bytes, rel=0.005)


def test_memory_is_asked_for_before_a_reward_takes_its(tmp_path, capsys, monkeypatch):
    """On a device that is full but for 0.1 GB: nothing is loaded, and the need has both."""
    monkeypatch.setattr("trainer.commands.by_reward.load_reward", lambda *_: pytest.fail("a reward was loaded"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))
    monkeypatch.setattr(sample, "policy_of", lambda args: pytest.fail("a model was loaded"))
    assert run(tmp_path / "x", "--optimise-noise", "reno", "--reward", "demo-proxy", "--device", "cuda") == 2
    assert "GB and cuda has 0.1 GB free: use fewer --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--noise-clip", 1), "--noise-clip needs --optimise-noise"),
        (("--optimise-noise", "reno"), "needs a reward"),
        (("--optimise-noise", "reno", "--reward", "compressibility", "--raw"), "needs a reward with a gradient"),
        (("--optimise-noise", "rotate", "--reward", "demo-proxy", "--search", "code"), "give one of the two"),
        (("--optimise-noise", "rotate", "--reward", "demo-proxy", "--noise-clip", 1), "rotate has no clip"),
        (("--optimise-noise", "rotate", "--reward", "demo-proxy", "--budget", 9), "--budget belongs to a search"),
        (("--optimise-noise", "rotate", "--reward", "demo-proxy", "--particles", 9), "--particles belongs to a search"),
    ],
)
def test_what_cannot_be_optimised_is_one_line_before_a_model_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "policy_of", lambda args: pytest.fail("a model was loaded"))
    assert run(tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_gradient_through_many_steps_is_warned_of(tmp_path, capsys):
    more = ("--optimise-noise", "reno", "--reward", "demo-proxy", "--noise-iterations", 1, "--overwrite")
    assert main(["sample", "--prompt", PROMPT, "-n", "1", "--steps", "9", "--out", str(tmp_path / "out"), *map(str, more)]) == 0
    assert "goes through all 9 steps" in capsys.readouterr().err
