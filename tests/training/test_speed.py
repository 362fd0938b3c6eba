"""Switches of speed and memory: what they may not change, and that they do what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.losses import batch_of, loss_of
from helpers.runs import settings
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.parity import run as parity
from tests.parity.pixels import natural_images
from trainer.__main__ import main
from trainer.config import ConfigError, build
from trainer.lora.file import save_lora
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.models.load import load_policy
from trainer.objectives import SQDF, ImageReFL, ReFL, RunContext
from trainer.objectives.reward_gradient.sqdf import rollouts
from trainer.objectives.shared import Sampler
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.training import checkpoint
from trainer.training.config import TrainConfig
from trainer.training.optimizers import STATE_BYTES, build_optimizer

PROMPTS = ("a red star", "two blue rings")
FAMILIES = pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev"])


@pytest.fixture
def tuned(family_folder):
    """A function from a family's name to a policy whose adapter changes a lot, a frozen consistency adapter beside it."""

    def make(family="sd15", dtype=torch.float32, **options):
        policy = load_policy(family_folder(family), dtype=dtype, image_size=64, **options)
        policy.add_lora(Lora(rank=2, alpha=4.0))
        policy.adapters.attach("consistency", Lora(rank=3, alpha=3.0, targets=("to_q",)))
        with torch.no_grad():
            for name in ("tuned", "consistency"):
                for p in policy.adapters.parameters(name).values():
                    p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7 if name == "tuned" else 11)))
        return policy

    return make


def outputs(policy, adapter="tuned", grad=False):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        return policy.denoiser(PROMPTS, adapter=adapter)(x, torch.tensor([0.8, 0.4]))


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.network.named_parameters()}


def batch(policy, seed=0):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))
    return batch_of(PROMPTS, Rng(seed, 0, (0, 1)), 0, latents)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


brightness.differentiable = True


def gradient(policy, objective=None, reward=brightness):
    """Gradients of one micro-batch by name."""
    objective = objective or ImageReFL(steps=5, grad_from=3, grad_to=4, start_from=1, start_to=2, refl_share=0.0, diffusion_weight=0.1)
    for p in policy.parameters():
        p.grad = None
    loss_of(objective, policy, batch(policy), reward)[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def same(a, b, tolerance):
    """Relative to the largest entry of all."""
    assert a.keys() == b.keys() and a
    largest = max(float(v.abs().max()) for v in a.values())
    assert largest > 0
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=tolerance * largest, msg=lambda m, name=name: f"{name}: {m}")


# -- merged rollouts ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_merged_adapter_predicts_the_same_and_leaves_every_bit(family, tuned):
    policy = tuned(family)
    policy.merge_rollouts = True
    apart, before = outputs(policy), weights(policy)
    trained = {n for n, p in policy.network.named_parameters() if p.requires_grad}
    base, other = outputs(policy, "base"), outputs(policy, "consistency")
    with policy.merged():
        # the proof that it is merged: the layers' own adapters are silent, the weights are others
        assert not all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())
        folded = outputs(policy)
        with policy.merged():
            assert torch.equal(outputs(policy), folded)
        with policy.adapters.using("base"):
            assert torch.equal(outputs(policy, "base"), base)
            with policy.merged():
                assert torch.equal(outputs(policy, "base"), base)
        assert torch.equal(outputs(policy, "base"), base) and torch.equal(outputs(policy, "consistency"), other)
        assert torch.equal(outputs(policy), folded)
        with pytest.raises(RuntimeError, match="no gradient reaches the adapter"):
            outputs(policy, grad=True)
    assert float((folded - apart).norm() / (apart - base).norm()) < 1e-5
    assert torch.equal(outputs(policy), apart)
    assert all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())
    assert {n for n, p in policy.network.named_parameters() if p.requires_grad} == trained


def test_an_error_inside_takes_the_adapter_out_again(tuned):
    policy = tuned()
    policy.merge_rollouts, before, apart = True, weights(policy), outputs(policy)
    with pytest.raises(KeyboardInterrupt), policy.merged():
        raise KeyboardInterrupt
    assert torch.equal(outputs(policy), apart)
    assert all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())


def test_bfloat16_weights_are_not_merged_because_a_small_update_would_be_lost(tuned):
    """W + ΔW is rounded to W where ΔW is below half of its last digit: here that is so for most entries."""
    policy = tuned(dtype=torch.bfloat16)
    policy.merge_rollouts = True
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.02)
    layer = next(layer for layer in policy.network.modules() if hasattr(layer, "get_delta_weight"))
    weight, update = layer.get_base_layer().weight, layer.get_delta_weight("default")
    assert float(((weight + update).to(torch.bfloat16) == weight).float().mean()) > 0.5 and bool((update != 0).all())
    before = weights(policy)
    with policy.merged():
        assert all(torch.equal(p, before[n]) for n, p in policy.network.named_parameters())


@pytest.mark.parametrize(
    "objective",
    [
        ReFL(steps=5, grad_from=3, grad_to=4, kl_weight=0.1),
        ImageReFL(steps=5, grad_from=3, grad_to=4, start_from=1, start_to=2, refl_share=0.0, diffusion_weight=0.1),
    ],
    ids=lambda o: type(o).__name__,
)
def test_objectives_have_the_same_gradient_with_merged_rollouts(objective, tuned):
    policy = tuned()
    apart = gradient(policy, objective)
    policy.merge_rollouts = True
    same(apart, gradient(policy, objective), 1e-4)


def test_rollouts_are_merged(tuned, monkeypatch):
    """Every network call of a rollout without gradient finds the adapters silent."""
    policy = tuned()
    policy.merge_rollouts = True
    seen = []
    inner = type(policy).predict

    def predict(self, *arguments):
        seen.append((torch.is_grad_enabled(), self.adapters.merged))
        return inner(self, *arguments)

    monkeypatch.setattr(type(policy), "predict", predict)
    x = batch(policy).latents
    first, last = torch.tensor([0, 1]), torch.tensor([2, 4])
    Sampler(RunContext(policy), batch(policy), 4, 1.0, 0.0).rollout(x, last, first)
    assert seen and all(folded for _, folded in seen)
    seen.clear()
    rollouts(SQDF(steps=3, buffer_gb=0.0), policy, PROMPTS, batch(policy).rng)
    assert len(seen) == 3 and all(folded for _, folded in seen)


# -- compiled blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "flux-dev"])
def test_blocks_of_every_family_are_compiled(family, tuned):
    policy = tuned(family)
    apart = outputs(policy)
    torch._dynamo.utils.counters.clear()
    policy.compile(backend="eager")
    torch.testing.assert_close(outputs(policy), apart, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_family_that_names_no_block_is_refused(tuned, monkeypatch):
    policy = tuned("sd15")
    monkeypatch.setattr(type(policy), "blocks", ())
    with pytest.raises(ValueError, match="no block of UNet2DConditionModel"):
        policy.compile(backend="eager")


def test_compiled_blocks_serve_every_adapter_state_and_keep_every_name(tuned, tmp_path):
    """Tracing alone (the backend eager): what a backend makes of the traced program is torch's own matter."""
    plain, policy = tuned("sd3"), tuned("sd3")
    names = [n for n, _ in policy.network.named_parameters()]
    torch._dynamo.utils.counters.clear()
    policy.compile(backend="eager")
    policy.gradient_checkpointing(denoiser=True, vae=False)
    policy.merge_rollouts = True
    objective = ImageReFL(steps=5, grad_from=3, grad_to=4, start_from=1, start_to=2, refl_share=0.0, diffusion_weight=0.1, kl_weight=0.1)
    same(gradient(plain, objective), gradient(policy, objective), 1e-4)
    for state in ("base", "consistency"):
        torch.testing.assert_close(outputs(policy, state), outputs(plain, state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(policy), outputs(plain), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in policy.network.named_parameters()] == names
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"], counters["graph_break"]
    assert not any("recompile_limit" in reason for reason in counters["unimplemented"]), counters["unimplemented"]
    for p, name in ((plain, "plain"), (policy, "compiled")):
        save_lora(p, tmp_path / name, {})
    ours, theirs = load_file(tmp_path / "compiled"), load_file(tmp_path / "plain")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- encoders off the device -------------------------------------------------------------------------------------------


@FAMILIES
def test_parked_encoders_come_back_for_what_is_new_and_leave_again(family, family_folder, monkeypatch):
    """There is no second device here: what is watched is where modules are sent."""
    policy, plain = (load_policy(family_folder(family), image_size=64, offload=offload) for offload in (True, False))
    policy.prompts.conditioning(PROMPTS)
    sent = []
    parts = {id(m): name for name, m in policy.pipeline.components.items() if isinstance(m, nn.Module)}
    parts |= {id(policy.vae.encoder): "vae.encoder", id(policy.vae.quant_conv): "vae.quant_conv"}
    whole = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, device, *a, **k: sent.append((parts[id(self)], str(device))) or whole(self, device, *a, **k)
    )
    texts = {name for name in parts.values() if name.startswith("text_encoder")}
    images = {"vae.encoder"} | ({"vae.quant_conv"} if policy.vae.quant_conv is not None else set())
    policy.to(torch.device("cpu", 0))  # equal in effect, another name than the plain "cpu"
    assert sent == [(policy.network_name, "cpu:0"), ("vae", "cpu:0"), *((name, "cpu") for name in sorted(images))] and texts
    sent.clear()
    policy.prompts.conditioning(PROMPTS)
    policy.decode(torch.zeros(1, *policy.latent_shape))
    outputs(policy)
    assert not sent
    new = ["a green square"]
    for ours, theirs in zip(policy.prompts.conditioning(new).values(), plain.prompts.conditioning(new).values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # weights that moved may be aligned otherwise
    assert (
        sent == [(n, "cpu:0") for n, _ in sent[: len(texts)]] + [(n, "cpu") for n, _ in sent[: len(texts)]]
        and {n for n, _ in sent} == texts
    )
    sent.clear()
    picture = torch.rand(1, 3, *policy.image_size, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(policy.encode(picture), plain.encode(picture)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(sent) == {(name, place) for name in images for place in ("cpu:0", "cpu")} and sent[-1][1] == "cpu"
    sent.clear()
    monkeypatch.setattr(type(policy), "encode_prompts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.prompts.conditioning(["a yellow cross"])
    assert sent[-1][1] == "cpu"


# -- memory formats, slices, attention ---------------------------------------------------------------------------------


def through_decoder(policy, grad=True):
    """Images and the gradient of their brightness to the latents."""
    latents = batch(policy).latents.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        images = policy.decode(latents)
    return images, torch.autograd.grad(images.square().sum(), latents)[0] if grad else None


@pytest.mark.parametrize("blocks", [False, True])
def test_a_decoder_in_slices_has_the_gradient_of_the_whole_and_one_image_at_a_time(blocks, tuned, monkeypatch):
    policy = tuned("sdxl")
    policy.gradient_checkpointing(denoiser=False, vae=blocks)
    whole, pull = through_decoder(policy)
    policy.autoencoder.slicing = True
    sizes = []
    inner = policy.vae.decode
    monkeypatch.setattr(policy.vae, "decode", lambda latents: sizes.append(len(latents)) or inner(latents))
    sliced, theirs = through_decoder(policy)
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs, pull, rtol=1e-4, atol=1e-5 * float(pull.abs().max()))
    assert sizes == [1] * 4  # two forward, two again going back
    torch.testing.assert_close(through_decoder(policy, grad=False)[0], whole, rtol=1e-5, atol=1e-5)
    same(gradient(tuned("sdxl")), gradient(policy), 1e-4)


def test_a_sliced_decoder_keeps_nothing_but_latents_for_the_backward_pass(tuned):
    policy = tuned("sd15")

    def kept():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            policy.decode(batch(policy).latents.requires_grad_())
        return sum(saved)

    whole = kept()
    policy.autoencoder.slicing = True
    assert kept() < whole / 100


@FAMILIES
def test_channels_last_changes_no_gradient(family, tuned):
    plain, policy = tuned(family), tuned(family)
    policy.use_channels_last()
    convolutions = [
        m.weight for m in (*policy.network.modules(), *policy.vae.modules()) if isinstance(m, nn.Conv2d) and m.weight.shape[-1] > 1
    ]
    assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    same(gradient(plain), gradient(policy), 1e-4)


class Counting:
    """Counts calls of torch's fused attention, and of the softmax that a plain one needs."""

    def __init__(self, monkeypatch):
        self.fused = self.plain = 0
        fused, plain = F.scaled_dot_product_attention, torch.Tensor.softmax

        def attention(*arguments, **more):
            self.fused += 1
            return fused(*arguments, **more)

        def softmax(*arguments, **more):
            self.plain += 1
            return plain(*arguments, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        for place in (F, torch, torch.Tensor):
            monkeypatch.setattr(place, "softmax", softmax)


@FAMILIES
def test_every_attention_of_a_model_is_torchs_fused_one(family, tuned, monkeypatch):
    """What runs in it depends on shapes and device; nothing is cut up by the memory that is free."""
    from diffusers.models.attention_processor import AttnProcessor

    policy, counted = tuned(family), Counting(monkeypatch)
    gradient(policy)
    assert counted.fused > 0 and counted.plain == 0
    if family == "sd15":  # the count can fail
        policy.network.set_attn_processor(AttnProcessor())
        gradient(policy)
        assert counted.plain > 0


@pytest.mark.parametrize("name", parity.CASES)
def test_every_attention_of_a_reward_is_torchs_fused_one_and_in_bfloat16_its_scores_stay(name, tmp_path, monkeypatch):
    parity.CASES[name].write(tmp_path, parity.CASES[name].small)
    exact, rounded = (parity.reopen(name, tmp_path, parity.CASES[name].small, dtype) for dtype in (torch.float32, torch.bfloat16))
    images = torch.stack(natural_images([(224, 224)] * 4))
    counted, pulls, scores = Counting(monkeypatch), [], []
    for reward in (exact, rounded):
        x = images.clone().requires_grad_()
        scores.append(reward(x, ["a fox", "two cats", "a red fox", "a cat"]))
        pulls.append(torch.autograd.grad(scores[-1].sum(), x)[0].flatten())
    assert counted.fused > 0 and counted.plain == 0
    assert scores[1].dtype == torch.float32 and not torch.equal(*scores)
    assert float(F.cosine_similarity(*pulls, dim=0)) > 0.9


# -- optimizers --------------------------------------------------------------------------------------------------------


def stepped(optimizer, parameter, steps, first=0):
    for number in range(first, first + steps):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_optimizers_follow_adamw_and_resume_exactly(name, tmp_path):
    def fresh(kind=name):
        parameter = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        return parameter, build_optimizer(kind, [parameter], 0.1, 0.01)

    whole, optimizer = fresh()
    stepped(optimizer, whole, 4)
    by_hand, m, v = torch.linspace(-1, 1, 12).reshape(3, 4), 0.0, 0.0
    for t in range(1, 5):  # Loshchilov and Hutter 2019, algorithm 2
        g = torch.randn(3, 4, generator=torch.Generator().manual_seed(t - 1))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        by_hand = by_hand * (1 - 0.1 * 0.01) - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(whole.detach(), by_hand, rtol=1e-5, atol=1e-6)
    cut, optimizer = fresh()
    stepped(optimizer, cut, 2)
    checkpoint.save({"p": cut.detach(), "o": optimizer.state_dict()}, tmp_path / "c.pt")
    state = checkpoint.load(tmp_path / "c.pt")
    again, optimizer = fresh()
    with torch.no_grad():
        again.copy_(state["p"])
    optimizer.load_state_dict(state["o"])
    stepped(optimizer, again, 2, first=2)
    assert torch.equal(again, whole)
    kept = sum(t.numel() * t.element_size() for t in optimizer.state[again].values() if t.ndim)
    assert kept == STATE_BYTES[name] * again.numel()
    assert (optimizer.param_groups[0]["fused"] is True) == (name == "adamw-fused")


def test_eight_bit_adamw_is_bitsandbytes_own_and_missing_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        build_optimizer("adamw-8bit", [nn.Parameter(torch.zeros(1))], 0.1, 0.0)

    class AdamW8bit(torch.optim.AdamW):
        pass

    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    optimizer = build_optimizer("adamw-8bit", [nn.Parameter(torch.zeros(1))], 0.1, 0.25)
    group = optimizer.param_groups[0]
    assert type(optimizer) is AdamW8bit and (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.25, (0.9, 0.999))


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_the_switches_reach_a_run(pipeline_folder, reward_folder, image_folder, tmp_path, monkeypatch):
    seen = []
    whole = DiffusersPolicy.use_channels_last
    monkeypatch.setattr(DiffusersPolicy, "use_channels_last", lambda self: seen.append(self) or whole(self))
    on = {
        "vae_slicing": True,
        "channels_last": True,
        "reward_dtype": "bfloat16",
        "optimizer": "adamw-fused",
        "steps": 1,
        "gradient_accumulation_steps": 1,
    }
    assert main(["train", *settings(pipeline_folder, reward_folder, image_folder, tmp_path / "run", **on)]) == 0
    (policy,) = seen
    assert (
        policy.prompts.offload
        and policy.merge_rollouts
        and policy.autoencoder.slicing
        and (tmp_path / "run" / "lora.safetensors").is_file()
    )
    with pytest.raises(ConfigError, match="reward_dtype = 'float16': use one of float32, bfloat16"):
        build(TrainConfig, {"out": "x", "reward_dtype": "float16"})


# -- the benchmark of large models -------------------------------------------------------------------------------------


def test_the_benchmark_for_gpus_runs_on_the_embedded_model(monkeypatch, capsys):
    """The rows and their columns; nothing is said of how long anything takes."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "large")
    import bench

    small = ["--batch", "1", "--steps", "4", "--rounds", "1", "--dtype", "float32"]
    assert bench.main(["--device", "cpu", "--models", "demo", *small, "--items", "vae_slicing", "merge_rollouts`, ReFL"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    chosen = ["`merge_rollouts`, ReFL (all rollouts from noise)", "`vae_slicing`", "all three checkpoints and `vae_slicing`"]
    assert [row[0].strip() for row in rows[1:]] == chosen
    assert all(len(row) == 8 and all(float(value) > 0 for value in row[1:]) for row in rows[1:])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 0 and "no CUDA device was found" in capsys.readouterr().out


def test_a_model_is_loaded_with_its_encoders_aside(family_folder, monkeypatch):
    """What encodes prompts and pictures never asks for the device but while it runs."""
    moves = []
    inner = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: (moves.append((self, a)), inner(self, *a, **k))[1])
    policy = load_policy(family_folder("sdxl"), offload=True)
    policy.to("cpu:0")
    asked = {id(module) for module, given in moves if given and str(given[0]) == "cpu:0"}
    assert id(policy.network) in asked and not asked & {id(policy.pipeline.text_encoder), id(policy.pipeline.text_encoder_2)}
    moves.clear()
    policy.prompts.conditioning(["a star"])
    asked = [str(given[0]) for module, given in moves if module is policy.pipeline.text_encoder and given]
    assert asked == ["cpu:0", "cpu"]


def test_the_decoder_is_recomputed_part_by_part_with_the_same_gradient(policy):
    """Nothing inside a residual block is kept: only what goes into one."""
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))

    def gradient_and_kept():
        x, kept = latents.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            value = policy.decode(x).square().mean()
        value.backward()
        return x.grad, sum(kept)

    plain, everything = gradient_and_kept()
    policy.gradient_checkpointing(denoiser=False, vae=True)
    again, few = gradient_and_kept()
    torch.testing.assert_close(again, plain)
    policy.gradient_checkpointing(denoiser=False, vae=False)
    assert few < everything / 2 and gradient_and_kept()[1] == everything
