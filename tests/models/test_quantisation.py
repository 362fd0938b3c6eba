"""Quantised frozen weights: the judge is the float model, with its own weights and with those that the quantised ones stand for.

int8 and fp8 need torchao, nf4 bitsandbytes. diffusers makes nf4 on GPUs alone; here its check for one is left out.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import plan_config, same_lora, settings
from models.test_split_files import original_klein
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.lora.file import load_lora, save_lora
from trainer.memory import plan as planning
from trainer.memory.dry_run import MemoryTracker
from trainer.memory.offload import tensors
from trainer.memory.planner import Planner
from trainer.models import load, quantisation
from trainer.models.load import load_policy
from trainer.models.meta import meta_policy
from trainer.models.open import open_policy
from trainer.models.quantisation import LIBRARIES, Quantisation, is_quantised
from trainer.models.second import with_network
from trainer.policy import Lora
from trainer.rewards.registry import load_reward
from trainer.sampling import trajectory
from trainer.training.parts import Parts
from trainer.training.run import Run

PROMPTS = ("a red star", "two blue rings")
TOLERANCE = {"int8": (0.01, 0.03), "fp8": (0.05, 0.12), "nf4": (0.25, 0.45)}
"""Relative errors of a rollout's images and of the adapter's gradient against float weights."""
FAMILIES = ["flux-dev", "krea2", "sdxl"]


@pytest.fixture(params=LIBRARIES)
def kind(request, monkeypatch):
    """A format whose library is installed."""
    if find_spec(LIBRARIES[request.param]) is None:
        pytest.skip(f"{request.param} needs {LIBRARIES[request.param]}: pip install -e .[quantised]")
    if request.param == "nf4":
        import bitsandbytes.nn.modules
        from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *a, **k: None)
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, given: given)
        monkeypatch.setattr(Quantisation, "check", lambda self, device: None)
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)  # whose layout is for widths of 64
    return request.param


def adapted(policy):
    policy.add_lora(Lora(rank=4, alpha=4.0))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    return policy


def results(policy, recompute=False):
    """The last x0-prediction of a rollout of 3 steps, and the gradient of a random function of its last step."""
    policy.gradient_checkpointing(denoiser=recompute, vae=False)
    noise, weights = (torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    denoiser, levels = policy.denoiser(PROMPTS, guidance_scale=2.0), policy.sigmas(3)
    with torch.no_grad():
        *_, last = trajectory(denoiser, policy.start(noise, 3), levels, lambda i: noise, "ddim", space=policy.space)
    predicted = denoiser(last.x, levels[2:3].expand(2))
    found = torch.autograd.grad((predicted * weights).sum(), policy.parameters(), allow_unused=True)
    return last.denoised, torch.cat([g.flatten() for g in found if g is not None])


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def dequantise(policy):
    """Every quantised layer of the denoiser as a float one of the same numbers."""
    for module in policy.network.modules():
        if is_quantised(module):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                plain.weight.copy_(quantisation.dequantised(module.weight))
            module.forward = partial(F.linear, weight=plain.weight.detach(), bias=module.bias)
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_and_gradients_are_those_of_float_weights(family, kind, family_folder, tmp_path):
    folder, options = family_folder(family), {"image_size": 64, "quantisation": Quantisation(kind)}
    policy = adapted(load_policy(folder, **options))
    assert all(p.dtype == torch.float32 for p in policy.parameters()) and policy.quantised
    save_lora(policy, tmp_path / "lora.safetensors", {})
    load_lora(load_policy(folder, **options), tmp_path / "lora.safetensors")
    here, same, plain = (
        results(policy),
        results(dequantise(adapted(load_policy(folder, **options)))),
        results(adapted(load_policy(folder, image_size=64))),
    )
    exact = [error(a, b) for a, b in zip(here, same)]
    rounded = [error(a, b) for a, b in zip(here, plain)]
    print(family, kind, *(f"{x:.2e}" for x in (*exact, *rounded)))
    assert max(exact) < 1e-4 and all(0 < e < t for e, t in zip(rounded, TOLERANCE[kind]))
    assert max(error(a, b) for a, b in zip(results(policy, recompute=True), here)) < 1e-5
    assert meta_bytes(policy.network) == meta_bytes(meta_policy(folder, quantisation=Quantisation(kind)).network)
    with pytest.raises(ValueError, match="tune = full needs weights that are not quantised"):
        load_policy(folder, **options).tune_weights()


def meta_bytes(network):
    """Bytes of what is not an adapter."""
    return sum(
        part.nbytes for name, p in (*network.named_parameters(), *network.named_buffers()) if ".lora_" not in name for part in parts_of(p)
    )


def parts_of(weight):
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    names = [*getattr(weight, "tensor_data_names", []), *getattr(weight, "optional_tensor_data_names", [])]
    return [part for name in names if (part := getattr(weight, name)) is not None] or [weight]


def test_a_file_is_quantised_as_its_folder(kind, family_folder, tmp_path, monkeypatch):
    from dataclasses import replace

    from trainer.models.klein import KleinPolicy

    folder = family_folder("klein")
    plain, quantised = load_policy(folder, image_size=64), Quantisation(kind, kind)
    name, config = next(iter(KleinPolicy.published.items()))
    network = (config.parts["transformer"][0], dict(plain.network.config))
    monkeypatch.setattr(load, "detect", lambda shapes: name)
    monkeypatch.setitem(load.MODELS, name, (KleinPolicy, replace(config, parts={**config.parts, "transformer": network})))
    save_file({k: v.contiguous() for k, v in original_klein(plain.network.state_dict()).items()}, tmp_path / "network.safetensors")
    file = load_policy(tmp_path / "network.safetensors", parts=folder, image_size=64, quantisation=quantised)
    whole = load_policy(folder, image_size=64, quantisation=quantised)
    both = [results(adapted(policy)) for policy in (file, whole, plain)]
    assert any(map(is_quantised, file.pipeline.text_encoder.modules())) and file.quantised
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    assert not torch.equal(both[0][0], both[2][0])


def test_a_second_network_is_quantised_as_the_first(kind, family_folder, tmp_path):
    """Its predictions are those of that model quantised alone; one of other shapes is refused by the shapes before."""
    folder, turbo, quantised = family_folder("krea2"), tmp_path / "turbo", Quantisation(kind)
    shutil.copytree(folder, turbo)
    (file,) = (turbo / "transformer").glob("*.safetensors")
    save_file({k: v + 0.1 * v.std(correction=0) for k, v in load_file(file).items()}, file, {"format": "pt"})
    base, alone = (load_policy(path, image_size=64, quantisation=quantised) for path in (folder, turbo))
    adapted(base)
    second = with_network(base, turbo)
    assert second.quantised and second.quantisation == quantised
    found, expected = results(adapted(second)), results(adapted(alone))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], results(base)[0])
    config = {key: value for key, value in base.network.config.items() if key != "quantization_config"}
    small = type(base.network).from_config({**config, "num_layers": 1})
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="is a model of another size or family"):
        with_network(base, tmp_path / "small")


def test_a_run_resumes_bit_for_bit_and_its_lora_is_for_any_weights(kind, pipeline_folder, reward_folder, image_folder, tmp_path, capsys):
    if kind == "nf4":
        pytest.skip("its device must be a GPU")
    options = json.dumps({"quantisation": kind, "text_encoder_quantisation": kind})[1:-1]
    more = {"model_options.quantisation": kind, "model_options.text_encoder_quantisation": kind, "gradient_checkpointing_denoiser": True}
    whole, parts, plain = ((pipeline_folder, reward_folder, image_folder, tmp_path / name) for name in ("whole", "parts", "plain"))
    assert main(["train", *settings(*whole, **more, steps=4)]) == 0
    assert main(["train", *settings(*parts, **more, steps=2)]) == 0
    assert main(["train", *settings(*parts, **more, steps=4), "--resume"]) == 0
    same_lora(tmp_path / "whole" / "lora.safetensors", tmp_path / "parts" / "lora.safetensors")
    assert main(["train", *settings(*parts, steps=6), "--resume"]) == 2 and "model_options" in capsys.readouterr().err, options
    assert main(["train", *settings(*plain, steps=1)]) == 0
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "plain"))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    policy = load_policy(pipeline_folder)
    load_lora(policy, tmp_path / "whole" / "lora.safetensors")
    save_lora(policy, tmp_path / "again.safetensors", {})
    assert all(torch.equal(v, one[k]) for k, v in load_file(tmp_path / "again.safetensors").items())


def test_what_cannot_be_quantised_is_refused_before_anything_is_loaded(family_folder, tmp_path, monkeypatch):
    folder = family_folder("sd15")
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    for given, message in (
        (Quantisation("int8"), "quantisation = int8 needs torchao, which is not installed: pip install torchao"),
        (Quantisation("", "nf4"), "text_encoder_quantisation = nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes"),
        (Quantisation("int4"), "quantisation = 'int4': use one of int8, fp8, nf4"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            load_policy(tmp_path / "nothing" if "int8" in message else folder, quantisation=given)
    monkeypatch.setattr(quantisation, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(ValueError, match="quantisation = nf4 needs a GPU: on a CPU use int8 or fp8"):
        load_policy(folder, quantisation=Quantisation("nf4"))
    with pytest.raises((ValueError, ConfigError), match="use one of int8"):
        open_policy("flux-dev", "meta", load.ModelOptions(quantisation="int4"))


@pytest.mark.parametrize(("fmt", "bits"), [("int8", 8.0), ("fp8", 8.0), ("nf4", 4.13)])
def test_a_published_model_has_so_many_bits_per_weight(fmt, bits):
    plain, quantised = (meta_policy("flux-schnell", torch.bfloat16, quantisation=Quantisation(q)).network for q in ("", fmt))
    assert 8 * meta_bytes(quantised) / sum(p.numel() for p in plain.parameters()) == pytest.approx(bits, rel=0.01)


def test_the_plan_is_what_a_real_step_holds(kind, pipeline_folder, tmp_path):
    """Live tensors of a step on the CPU, with and without recomputation: within 5 %."""
    for recompute in (False, True):
        options = {"quantisation": kind, "text_encoder_quantisation": kind}
        more = {"model": str(pipeline_folder), "model_options": options, "gradient_checkpointing_denoiser": recompute}
        c = plan_config(**more, out=str(tmp_path), merge_rollouts=False)
        found, policy = Planner()(c), open_policy(str(pipeline_folder), options=load.ModelOptions(**options))
        held = found.counted - found.components["embeddings of prompts"]
        measured = peak_of_a_step(c, policy, tmp_path)
        print(kind, recompute, held, measured)
        assert held == pytest.approx(measured, rel=0.05)


def peak_of_a_step(config, policy, folder):
    reward = load_reward("demo-proxy", False)
    latents = torch.zeros(2, *policy.latent_shape)
    samples = Samples(("a", "b"), LatentsInMemory(latents, latents))
    run = Run(planning.without_side_effects(config, folder), Parts(policy, samples, reward))
    policy.prompts.conditioning(("a", "b", ""))
    weights = [part for p in tensors(policy.network, policy.vae, policy.pipeline.text_encoder, reward) for part in parts_of(p)]
    tracker = MemoryTracker(torch.device("cpu"))
    tracker.attribute(weights, "weights")
    with tracker:
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.loss(run.batches(0, 0))[0].backward()
    return tracker.peak.bytes
