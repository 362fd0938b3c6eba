"""Run inside a ComfyUI: LoRAs that are on for some steps, against chains of the stock sampler over models that share nothing.

Usage: ranges.py COMFYUI PACK PIPELINE LORA STYLE_LORA. Prints one JSON line. Euler has no history, so a chain of KSamplerAdvanced
with a merged LoRA for each part is the truth.
"""

import contextlib
import copy
import json
from dataclasses import replace
from functools import partial

import embedded  # first: it puts ComfyUI on the path
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy_extras.nodes_model_merging
import nodes as stock
import torch
from compare import Case, error, switch
from safetensors.torch import load_file

ranged, schedule = embedded.ours("nodes.ranged"), embedded.ours("nodes.schedule")
gates = embedded.ours("nodes.gate")
pipeline_folder, *files = embedded.arguments
rng = torch.Generator().manual_seed(0)
positive, negative = ([[torch.randn(1, 77, 128, generator=rng), {}]] for _ in range(2))
case = Case(positive, negative, steps=8)
REWARD, STYLE = map(load_file, files)


def apart(*loras):
    """A model of its own with merged LoRAs."""
    model = embedded.build(pipeline_folder)
    for tensors in loras:
        model = embedded.with_lora(model, tensors)[0]
    return model


def chain(*parts):
    """Parts (first step, LoRAs) by one KSamplerAdvanced each."""
    latent, ends = case.latent(), [*(first for first, _ in parts[1:]), 10000]
    for (first, loras), end in zip(parts, ends):
        noise, leftover = ("enable" if first == 0 else "disable"), ("enable" if end < 10000 else "disable")
        common = (noise, 3, case.steps, case.cfg, "euler", "normal", positive, negative, latent, first, end, leftover)
        latent = stock.KSamplerAdvanced().sample(apart(*loras), *common)[0]
    return latent["samples"]


def within(model, tensors, mode, start, end, strength=1.0):
    """As the node does, from tensors."""
    own = schedule.bare(model)
    tuned = embedded.with_lora(own, tensors, strength)[0]
    return ranged.ranged(model, own, tuned, ranged.when(tuned, mode, start, end))


def flipped(model):
    """Unsampling: the levels of the stock sampler, from low to high."""
    levels = comfy.samplers.KSampler(model, case.steps, torch.device("cpu"), "euler", "normal", 1.0, {}).sigmas.flip(0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    start = torch.zeros(case.shape)
    return guider.sample(start, start, comfy.samplers.sampler_object("euler"), levels, disable_pbar=True, seed=3)


results = {"errors": {}, "computed": {}, "refused": {}}
sample, errors = partial(case.stock, sampler="euler"), results["errors"]
with torch.inference_mode():
    base = embedded.build(pipeline_folder)
    plain = sample(base)
    sigmas = [float(s) for s in comfy.samplers.KSampler(base, 8, torch.device("cpu"), "euler", "normal", 1.0, {}).sigmas]
    early = chain((0, [REWARD]), (2, []))
    errors["first 2 steps"] = error(sample(within(base, REWARD, "step", 0, 2)), early)
    errors["first quarter"] = error(sample(within(base, REWARD, "fraction", 0.0, 0.25)), early)
    errors["by noise level"] = error(sample(within(base, REWARD, "sigma", 10000, sigmas[2])), early)
    errors["steps 3 to 5"] = error(sample(within(base, REWARD, "step", 3, 6)), chain((0, []), (3, [REWARD]), (6, [])))
    errors["from step 6 on"] = error(sample(within(base, REWARD, "step", 6, 10000)), chain((0, []), (6, [REWARD])))
    two = within(within(base, REWARD, "step", 0, 5), STYLE, "step", 3, 7)
    wanted = chain((0, [REWARD]), (3, [REWARD, STYLE]), (5, [STYLE]), (7, []))
    errors["two that overlap"] = error(sample(two), wanted)
    errors["a stock LoRA on top"] = error(
        sample(embedded.with_lora(within(base, REWARD, "step", 0, 2), STYLE)[0]), chain((0, [REWARD, STYLE]), (2, [STYLE]))
    )
    errors["effect"] = error(early, plain)

    # switches in either direction, and with LoRAs in ranges below them
    tuned, styled = embedded.with_lora(base, REWARD)[0], embedded.with_lora(base, STYLE)[0]
    make = lambda a, b, k=5: switch.switched(a, b, switch.Rule("step", k))  # noqa: E731
    errors["from tuned to base"] = error(sample(make(tuned, base, 2)), early)
    errors["from one LoRA to another"] = error(sample(make(styled, tuned)), chain((0, [STYLE]), (5, [REWARD])))
    both = make(within(base, STYLE, "step", 0, 2), tuned)
    errors["a range in the base's part"] = error(sample(both), chain((0, [STYLE]), (2, []), (5, [REWARD])))
    below = within(base, STYLE, "step", 0, 6)
    errors["a range below both"] = error(
        sample(make(below, embedded.with_lora(below, REWARD)[0])), chain((0, [STYLE]), (5, [STYLE, REWARD]), (6, [REWARD]))
    )
    errors["a range over a switch"] = error(
        sample(within(make(base, tuned), STYLE, "step", 3, 10000)), chain((0, []), (3, [STYLE]), (5, [STYLE, REWARD]))
    )
    # an object patch puts another layer in the place of one, after the gate has found its layers
    replaced = within(base, REWARD, "step", 0, 10000)
    whole = sample(replaced)
    layer = next(name for name in replaced.weight_wrapper_patches if name.endswith("to_q.weight")).removesuffix(".weight")
    replaced = replaced.clone()
    replaced.add_object_patch(layer, copy.deepcopy(comfy.utils.get_attr(base.model, layer)))
    errors["over a replaced layer"] = error(sample(replaced), whole)
    # a hook changes the stored weights from one conditioning to the next
    hooks = comfy.hooks.create_hook_lora(lora=dict(STYLE), strength_model=1.0, strength_clip=0.0)
    hooked = replace(case, positive=comfy.hooks.set_hooks_for_conditioning(positive, hooks=hooks))
    expected = hooked.stock(apart(REWARD), "euler")
    errors["under a hook LoRA"] = error(hooked.stock(within(base, REWARD, "step", 0, 10000), "euler"), expected)
    results["hook's effect"] = error(expected, sample(apart(REWARD)))
    results["base kept"] = bool(torch.equal(sample(base), plain))

    # patched weights are computed once a run where memory allows; what comes out does not depend on it
    counted, real = [], comfy.lora.calculate_weight
    comfy.lora.calculate_weight = lambda *args, **kwargs: (counted.append(1), real(*args, **kwargs))[1]

    def run(spare):
        """Patched weights computed, bytes kept at the most, and whether the images are those of the chain."""
        most, before = [0], gates.Kept.make_room
        if spare is not None:
            gates.Kept.make_room = lambda self, *_: setattr(self, "spare", spare if self.spare is None else self.spare)
        keep = gates.Kept.keep

        def keeping(self, *args):
            keep(self, *args)
            most.append(sum(v.nbytes for v in self.values.values()))

        gates.Kept.keep = keeping
        counted.clear()
        try:
            same = torch.equal(sample(two), once)
            return [len(counted), max(most), same]
        finally:
            gates.Kept.make_room, gates.Kept.keep = before, keep

    sample(two)  # loaded
    once = sample(two)
    gate = next(g for g in gates._gates.values() if g.uuid == two.patches_uuid)
    results["kept after"] = gate.kept is not None
    per = [sum(any(w.patches[i] for i in on) for w in gate.weights.values()) for on in ((0,), (0, 1), (1,))]
    results["weights"] = per
    size = results["bytes"] = sum(getattr(layer, w.kind).nbytes for w, layer in zip(gate.weights.values(), gate.layers(base.model)))
    for name, spare in (("all", None), ("none", 0), ("a tenth", size // 10), ("one set", size)):
        results["computed"][name] = run(spare)

    def stop(_module, _inputs):
        seen.append(sum(len(kept.values) for kept in (gate.kept or {}).values()))
        if len(seen) == 3:
            raise kind

    for kind in (RuntimeError, comfy.model_management.InterruptProcessingException):
        seen = []
        hook = base.model.diffusion_model.register_forward_pre_hook(stop)
        with contextlib.suppress(kind):
            sample(two)
        hook.remove()
        results[f"after {kind.__name__}"] = [seen, gate.kept is None, bool(torch.equal(sample(base), plain))]

    merged = comfy_extras.nodes_model_merging.ModelMergeSimple().merge(base, embedded.build(pipeline_folder), 0.5)[0]
    other, zero = embedded.build(pipeline_folder), {k: torch.zeros_like(v) for k, v in REWARD.items()}
    pair = switch.switched(base, other, switch.Rule("step", 4))
    results["refused"] = {
        "empty steps": embedded.refused(lambda: within(base, REWARD, "step", 4, 4)),
        "fraction": embedded.refused(lambda: within(base, REWARD, "fraction", 0.5, 2.0)),
        "noise levels": embedded.refused(lambda: within(base, REWARD, "sigma", 1.0, 2.0)),
        "beyond": embedded.refused(lambda: sample(within(base, REWARD, "step", 9, 10000))),
        "auto": embedded.refused(lambda: within(base, REWARD, "auto", 0.0, 0.0)),
        "zero": embedded.refused(lambda: within(base, zero, "step", 0, 2)),
        "two checkpoints": embedded.refused(lambda: within(pair, REWARD, "step", 0, 2)),
        "below two checkpoints": embedded.refused(
            lambda: switch.switched(within(base, REWARD, "step", 0, 2), other, switch.Rule("step", 4))
        ),
        "no step in a share": embedded.refused(lambda: sample(within(base, REWARD, "fraction", 0.5, 0.51))),
        "no step before the end": embedded.refused(lambda: sample(within(base, REWARD, "step", 8, 10000))),
        "rising noise levels": embedded.refused(lambda: flipped(within(base, REWARD, "step", 0, 2))),
        "merge at half strength": embedded.refused(lambda: switch.switched(base, merged, switch.Rule("step", 4), 0.5)),
        "same below both": embedded.refused(lambda: make(two, two)),
    }
print(json.dumps(results))
