"""Real configurations, random weights: one step of every objective, and the LoRA of each in diffusers and in ComfyUI.

Usage: verify.py [MODEL ...] [--out FILE.jsonl]; without names, all of MODELS. COMFYUI_PATH, else the newest that is found, is the
ComfyUI; without one its part is skipped, and the result says so. Exit status 1 when anything failed.

What is true to the published models: the denoiser (SD1.5, SDXL and SD3.5-medium whole; FLUX with fewer blocks), the
autoencoder, the schedule, every module name. What is not: weights are random, text encoders are small ones of the right
widths, images are 128×128. Weights are bfloat16, as in training; for the comparison each module's weights are made
float32 while it runs, because bfloat16 arithmetic would hide small mistakes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.hosts import chosen, environment
from tests.helpers.tokens import template_tokenizer
from trainer.data.batches import Images
from trainer.denoiser import per_sample
from trainer.lora.file import save_lora
from trainer.lora.names import HALVES, SCALED, root_of, stem
from trainer.models.adapters import Adapters
from trainer.models.load import MODELS as PUBLISHED
from trainer.models.single_file import clip_tokenizer
from trainer.objectives import OBJECTIVES, RunContext
from trainer.policy import Lora
from trainer.rng import Rng
from trainer.training.loop import train

# Those that do not fit have fewer blocks
MODELS = {
    **{"sd15": {}, "sdxl": {}, "sd35-medium": {}, "flux-dev": {"num_layers": 1, "num_single_layers": 2}},
    **{"z-image": {"n_layers": 2}, "flux2-klein-4b": {"num_layers": 1, "num_single_layers": 2}},
    **{"flux2-klein-9b": {"num_layers": 1, "num_single_layers": 2}, "krea2": {"num_layers": 1}, "qwen-image": {"num_layers": 2}},
    **{"chroma": {"num_layers": 1, "num_single_layers": 2}, "anima": {"num_layers": 2}},
}
NAMES = ("sd15", "sd21", "sdxl", "sd3-medium", "sd35-medium", "sd35-large", "flux-dev", "flux-schnell", *[*MODELS][4:])
SIZE = 128  # pixels
STEPS = 5  # of the sampler, for objectives that have steps; indices of a grid shrink in proportion
# Settings that count steps, queries or bytes without being indices of the grid
SMALLER = {"cut_mean": 3.0, "cut_std": 1.0, "early_stop": 2, "k": 2, "queries": (2, 2), "epochs": 2, "buffer_gb": 0.01}
SMALLER |= {"group": 2, "prompts_per_round": 1}
TOLERANCE = 1e-3  # of the denoised output: RMS of the difference from the trainer's, over RMS of what the LoRA changes
PROMPTS = ("a red star", "a blue ring")
HERE = Path(__file__).resolve()


class Brightness:
    """A cheap reward that looks at all pixels and at the words: mean colour along a direction that the text draws."""

    differentiable = True
    takes_prefixes = True

    def image_features(self, images):
        """Mean colours (B,3)."""
        return images.float().mean((2, 3))

    def text_features(self, prompts):
        """The texts' directions (B,3)."""
        return torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts])

    def __call__(self, images, prompts):
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        return self.scores(images, prompts, [""])[:, 0]

    def scores(self, images, prompts, prefixes):
        """The same for each of P prefixes of the prompt: (B,P)."""
        directions = torch.stack([self.text_features([p + t for p in prefixes]) for t in prompts])
        return torch.einsum("bpc,bc->bp", directions, self.image_features(images))


def tiny_text(kind, config):
    """A random text encoder of the right widths, as shallow as its use allows."""
    import transformers

    cls = getattr(transformers, kind)
    small = {"num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 1}
    if kind == "T5EncoderModel":
        small = {"num_layers": 1, "d_ff": 64, "num_heads": 1}
    if kind.startswith("Qwen3"):  # whose layers 9, 18 and 27 are klein's conditioning, and 2, 5, … 35 Krea 2's
        small |= {"num_hidden_layers": 36, "num_key_value_heads": 1, "vocab_size": 64}
    if kind.startswith("Qwen2"):  # whose rotary sections are of a head's true width
        small = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}
    if "text_config" in config:
        eyes = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "deepstack_visual_indexes": [0]}
        small = {"text_config": {**config["text_config"], **small}, "vision_config": {**config["vision_config"], **eyes}}
    return cls(cls.config_class(**{**config, **small}))


def letters():
    """A tokenizer of letters, for T5 and Qwen3: their own vocabularies are in no package."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **{chr(97 + i): 3 + i for i in range(26)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] }} assistant{% endfor %}"
    return tokenizer


def random_network(kind, config, device="cpu"):
    """A network of that class in bfloat16, made on the device: matrices of spread 1/√fan-in, norms at one, biases at zero."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # what is computed, as tables of positions, keeps its values
        network = getattr(diffusers, kind)(**config)
    computed = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network = network.to(torch.bfloat16).to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    for name, p in network.named_parameters():
        with torch.no_grad():
            if p.ndim > 1:
                p.normal_(0, 1 / math.sqrt(p[0].numel()), generator=rng)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in computed.items():
        network.get_buffer(name).copy_(buffer)
    network.computed = {name: computed[name] for name in computed.keys() - network.state_dict().keys()}  # which no file holds
    return network


def build(name, folder, device="cpu", dtype=torch.bfloat16, size=SIZE):
    """A policy over random weights of the family `name`."""
    import diffusers

    torch.manual_seed(0)  # text encoders
    family, model = PUBLISHED[name]
    parts = {}
    for part, ((library, kind), config) in model.parts.items():
        config = {**config, **MODELS[name]} if part in ("unet", "transformer") else config
        parts[part] = random_network(kind, config, device) if library == "diffusers" else tiny_text(kind, config)
    for i, part in enumerate(p for p in model.parts if p.startswith("text_encoder")):
        clip = model.parts[part][0][1].startswith("CLIP")
        parts[part.replace("text_encoder", "tokenizer")] = clip_tokenizer(folder / f"words{i}") if clip else letters()
        if "text_config" in model.parts[part][1]:  # a vision-language model, whose template is long
            parts["tokenizer"] = template_tokenizer()
    parts |= {name: letters() for name in family.more_tokenizers}
    scheduler = getattr(diffusers, model.scheduler[0])(**model.scheduler[1])
    pipeline = family.assemble(**{**family.arguments, **model.arguments, **parts, "scheduler": scheduler})
    policy = family(pipeline, device, dtype, size)
    if "text_config" in model.parts["text_encoder"][1]:
        policy.max_tokens = 16  # its padding is masked, and takes most of the time
    return policy


def reduced(kind):
    """An objective from its defaults, with steps and indices of the grid brought to STEPS; nothing here knows which one."""
    values = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    if "steps" not in values:
        return kind()
    shrunk = {"steps": STEPS}
    for f in fields(kind):
        # an index of the grid is an integer whose highest value is the last of a thousand steps
        if f.metadata.get("max") == 999 and isinstance(values.get(f.name), int):
            shrunk[f.name] = values[f.name] * STEPS // values["steps"]
    if "refl_share" in values:
        shrunk["refl_share"] = 0.0  # the branch with images, which needs more
    return kind(**shrunk, **{name: value for name, value in SMALLER.items() if name in values})


def peak_gb():
    """Highest resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@contextmanager
def exact(policy):
    """Inside, every module of the network has float32 weights while it runs, and the arithmetic is float32."""
    handles = []
    # Z-Image's embedding of the timestep asks for its layers' type before they run: it is made wide as a whole
    whole = [module for module in policy.network.modules() if type(module).__name__ == "TimestepEmbedder"]
    inside = {part for module in whole for part in module.modules()} - {*whole}
    for module in policy.network.modules():
        own = [(n, p) for n, p in module.named_parameters(recurse=module in whole) if p.dtype == torch.bfloat16]
        if not own or module in inside:
            continue

        def widen(module, _, own=own):
            for _, p in own:
                p.narrow = p.data
                p.data = p.data.float()

        def restore(module, _, output, own=own):
            for _, p in own:
                p.data = p.narrow

        handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    buffers = [(m, n, b) for m in policy.network.modules() for n, b in m.named_buffers(recurse=False)]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.float())
    for path, buffer in getattr(policy.network, "computed", {}).items():
        inside, _, name = path.rpartition(".")
        setattr(policy.network.get_submodule(inside), name, buffer)
    policy.dtype = torch.float32
    try:
        yield
    finally:
        policy.dtype = torch.bfloat16
        for handle in handles:
            handle.remove()
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def rms(x):
    return float(x.double().square().mean().sqrt())


def verify(name, folder, log):
    """All objectives on one model; returns a row per objective."""
    begin = time.monotonic()
    policy = build(name, folder)
    parameters = sum(p.numel() for p in policy.network.parameters())
    log(f"{name}: {parameters / 1e6:.0f} M parameters built in {time.monotonic() - begin:.0f} s, peak {peak_gb():.1f} GB")
    policy.network.eval()
    rng = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.8, 0.3]) if policy.space == "flow" else policy.levels[torch.tensor([701, 226])].float()
    x = torch.randn(2, *policy.latent_shape, generator=rng) * per_sample(
        1 + sigma if policy.space == "ve" else sigma.new_ones(2), torch.zeros(2, 1, 1, 1)
    )
    latents = torch.randn(1, *policy.latent_shape, generator=rng)
    cond = policy.prompts.conditioning(PROMPTS)
    with torch.no_grad(), exact(policy):
        base = policy.denoiser(PROMPTS)(x, sigma)
    rows, outputs = [], {"x": x, "sigma": sigma, "base": base, **{f"cond.{k}": v.float() for k, v in cond.items()}}
    for objective_name, kind in OBJECTIVES.items():
        row = {"model": name, "objective": objective_name}
        begin = time.monotonic()
        try:
            policy.add_lora(Lora(rank=4, alpha=8.0))
            policy.gradient_checkpointing(denoiser=True, vae=True)
            before = {n: p.detach().clone() for n, p in policy.named_parameters()}
            optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)  # so large that one step is visible
            batch = Images(PROMPTS[:1], Rng(0, 0, (0,)), 0, latents)
            loss = reduced(kind).begin(RunContext(policy, Brightness(), Brightness(), folder=folder / objective_name, prompts=PROMPTS))
            step = next(iter(train(loss, lambda *_, batch=batch: batch, list(policy.parameters()), optimizer, steps=1)))
            moved = sum(not torch.equal(p, before[n]) for n, p in policy.named_parameters())
            row |= {"loss": step.loss, "grad_norm": step.grad_norm, "moved": f"{moved} of {len(before)}"}
            row["step_s"] = round(time.monotonic() - begin, 1)
            policy.gradient_checkpointing(denoiser=False, vae=False)
            file = folder / f"{name}-{objective_name}.safetensors"
            save_lora(policy, file, {})
            with torch.no_grad(), exact(policy):
                outputs[objective_name] = tuned = policy.denoiser(PROMPTS)(x, sigma)
            row["effect"] = rms(tuned - base) / rms(base)
            adapted = set(policy.adapters.matching(policy.targets))
            factors = {n: p.detach().clone() for n, p in policy.named_parameters()}
            policy.network.delete_adapters("default")
            row |= in_diffusers(policy, file, adapted, factors, x, sigma, tuned, base)
        except Exception as error:
            log(traceback.format_exc())
            row["error"] = f"{type(error).__name__}: {error}"
        finally:
            if getattr(policy.network, "peft_config", {}):
                policy.network.unload_lora()  # peft's layers, too
            policy.lora, policy.adapters = None, Adapters(policy.network, policy.targets)
        row["peak_gb"] = round(peak_gb(), 1)
        log(json.dumps(row))
        rows.append(row)
    comfyui = chosen()
    if comfyui is not None:
        save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")
        state = {k.replace(".base_layer.", "."): v for k, v in policy.network.state_dict().items() if ".lora_" not in k}
        for part, start in policy.within.items():
            state |= {start + k: v for k, v in getattr(policy.pipeline, part).state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "network.safetensors")
        told = {
            "name": name,
            "size": SIZE,
            "guidance": getattr(policy, "embedded_guidance", None),
            "objectives": [r["objective"] for r in rows if "effect" in r],
        }
        del policy, outputs, state
        gc.collect()  # two copies of the network would not fit
        found = in_comfyui(comfyui, "compare", folder, told, log)
        for row in rows:
            row |= {"comfyui": found.get(row["objective"], "no result")}
        (folder / "network.safetensors").unlink()
        log(json.dumps(found))
    for row in rows:
        row["passed"] = passed(row, comfyui is not None)
    return rows


def in_diffusers(policy, file, adapted, factors, x, sigma, tuned, base):
    """The saved file in diffusers' own loader: modules that do not match, and how far its output is off.

    The loader rounds a LoRA to the model's bfloat16. `diffusers_rounded` is the output so; for `diffusers_off` each
    factor that is the trainer's but for rounding is given back its digits.
    """
    policy.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    policy.network.eval()
    loaded = {n: p for n, p in policy.network.named_parameters() if ".lora_" in n}
    modules = {n.split(".lora_")[0] for n in loaded}
    written = load_file(file)
    pairs = sum(k.endswith((".lora_down.weight", ".lora_A.weight")) for k in written)
    outputs = []
    for digits in (False, True):
        for n, p in loaded.items():
            half = "lora_A" if ".lora_A." in n else "lora_B"
            given = factors[f"{n.split('.lora_')[0]}.{half}.default.weight"]
            if digits and half == "lora_B" and policy.lora_layout in SCALED:
                given = given * (policy.lora.alpha / policy.lora.rank)  # which the file has inside B
            p.data = p.data.float()
            if digits and rms(p.data - given) < 2**-8 * rms(given):
                p.data = given
        with torch.no_grad(), exact(policy):
            outputs.append(policy.denoiser(PROMPTS)(x, sigma))
    rounded, off = (rms(output - tuned) / rms(tuned - base) for output in outputs)
    return {"diffusers_unmatched": len(adapted ^ modules) + abs(pairs - len(modules)), "diffusers_rounded": rounded, "diffusers_off": off}


def in_comfyui(comfyui, what, folder, told, log):
    """Run in_comfyui.py in a process of its own, away from our `nodes`; its last line is JSON."""
    (folder / "told.json").write_text(json.dumps(told))
    command = [sys.executable, str(HERE.with_name("in_comfyui.py")), str(comfyui), what, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    if done.returncode:
        log(done.stdout[-2000:] + done.stderr[-4000:])
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def passed(row, comfy):
    """Whether a row shows what it must."""
    good = "error" not in row and row.get("diffusers_unmatched") == 0 and row["diffusers_off"] < TOLERANCE and row["effect"] > 1e-3
    if not (good and comfy):
        return good
    theirs = row["comfyui"]
    return isinstance(theirs, dict) and theirs["unmatched"] == 0 and theirs["off"] < TOLERANCE


def verify_names(name, folder, log):
    """Every LoRA key of the whole published model, on the meta device: diffusers' modules, ComfyUI's key map."""
    import diffusers

    family, model = PUBLISHED[name]
    (_, kind), config = model.parts[family.network_name]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config)
    modules = Adapters(network, family.targets).matching(family.targets)
    root, suffix = root_of(modules), HALVES[family.lora_layout][0]
    keys = [stem(m, family.lora_layout, root) + suffix for m in modules]
    row = {"names": name, "lora_modules": len(modules)}
    comfyui = chosen()
    if comfyui is not None:
        shapes = {k: list(v.shape) for k, v in network.state_dict().items()}
        for part, start in family.within.items():
            (_, kind), config = model.parts[part]
            with torch.device("meta"):
                shapes |= {start + k: list(v.shape) for k, v in getattr(diffusers, kind)(**config).state_dict().items()}
        row["comfyui_unmatched"] = in_comfyui(comfyui, "names", folder, {"shapes": shapes, "keys": keys}, log).get("unmatched", "no result")
    row["passed"] = len(modules) >= 80 and row.get("comfyui_unmatched", 0) == 0
    log(json.dumps(row))
    return [row]


def main():
    """Verify the models that are named, write a line each, say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, "names", []], help="default: all, and the names of every published model")
    parser.add_argument("--out", type=Path, default=Path("verify-large.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for name in arguments.models or [*MODELS, "names"]:
        with tempfile.TemporaryDirectory() as folder:
            say = lambda line: print(time.strftime("%H:%M:%S"), line, flush=True)  # noqa: E731
            if name == "names":
                rows += [row for n in NAMES for row in verify_names(n, Path(folder), say)]
            else:
                rows += verify(name, Path(folder), say)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed" + ("" if chosen() else "; no ComfyUI was found"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
