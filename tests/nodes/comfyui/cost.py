"""What combined sampling costs in time and memory, in pairs within one process, on the CPU with one thread.

Usage: cost.py COMFYUI PACK MODEL LATENT STEPS PAIRS, with MODEL tiny (SD1.5 class, 16 M), true (SD1.5's own configuration, 860 M, random
weights) or embedded, and LATENT the side of the latent. Prints a Markdown table. By hand: no test asserts a time.
Guidance is equal in all steps, so that all ways evaluate the model equally often; the switch is half-way, the LoRA of rank 4. A second
table compares patched weights that are kept for the run with weights that are patched at every evaluation, for several switches.
"""

import contextlib
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args as options

options.use_pytorch_cross_attention = True

import embedded
import nodes as stock
import tiny
import torch
from compare import Case

model_name, (latent, steps, pairs) = embedded.arguments[0], map(int, embedded.arguments[1:])
if model_name == "true":
    tiny.SD15.update(num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0])
    tiny.OUTER.update(transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1)
width = 128 if model_name == "embedded" else 768
rng = torch.Generator().manual_seed(0)
positive, negative = ([[torch.randn(1, 77, width, generator=rng), {}]] for _ in range(2))
case = Case(positive, negative, (1, 4, latent, latent), steps=steps, k=steps // 2, tuned_cfg=4.0)


def build():
    return embedded.ours("nodes.demo").load_model() if model_name == "embedded" else tiny.sd15(1)


def chained(base, tuned):
    """Two KSamplerAdvanced, the way without this pack."""
    node, common = stock.KSamplerAdvanced(), (3, case.steps, case.cfg, "euler", "normal", case.positive, case.negative)
    first = node.sample(base, "enable", *common, case.latent(), 0, case.k, "enable")[0]
    return node.sample(tuned, "disable", *common, first, case.k, 10000, "disable")[0]


def tensor_mb():
    """Everything that tensors hold, each memory once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 1e6


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e6


def at_every_evaluation(way):
    """Nothing is kept: as where memory is short."""
    gate, real = embedded.ours("nodes.gate").Gate, embedded.ours("nodes.gate").Gate.sampling
    gate.sampling = lambda *_: contextlib.nullcontext()
    try:
        return way()
    finally:
        gate.sampling = real


def kept_or_not(base, tuned):
    """Rows: a switch, and what keeping patched weights saves and takes."""
    yield "| switch at | tuned evaluations | of the processor, s per tuned evaluation more than the base's: kept | each time | MB kept |"
    yield "|---|---|---|---|---|"
    kept = []
    keep = embedded.ours("nodes.gate").Kept.keep
    embedded.ours("nodes.gate").Kept.keep = lambda self, *a: (keep(self, *a), kept.append(sum(v.nbytes for v in self.values.values())))[0]
    for share in (0.0, 0.25, 0.75):
        k = round(share * steps)
        way = lambda k=k: case.combined(base, tuned, "euler", at=k)  # noqa: E731
        ways = {PLAIN: plain[PLAIN], "kept": way, "each time": lambda way=way: at_every_evaluation(way)}
        kept.clear()
        found = pairs_of(ways)
        more = {name: statistics.median((a.cpu - b.cpu) / (steps - k) for a, b in zip(*found[name])) for name in ("kept", "each time")}
        yield f"| {100 * share:.0f} % | {steps - k} | {more['kept']:.3f} | {more['each time']:.3f} | {max(kept) / 1e6:.0f} |"


class Run(NamedTuple):
    """Seconds on the clock and of the processor, evaluations, MB that stay in tensors, MB of the process at its peak."""

    wall: float
    cpu: float
    evaluations: int
    tensors: float
    peak: float


def run(way):
    """One sampling run, measured."""
    calls.clear()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    wall, cpu = time.perf_counter(), time.process_time()
    result = way()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del result
    return Run(wall, cpu, sum(calls), tensor_mb(), status("VmHWM"))


def table(measured, without):
    """Medians; times against the plain run of the same pair, memory against the plain run before there was a LoRA."""
    yield "| way | evaluations | s (of the processor) | time against plain | of the processor | MB more in tensors | MB more at the peak |"
    yield "|---|---|---|---|---|---|---|"
    for name, (runs, plains) in measured.items():
        wall, cpu = (statistics.median(getattr(a, kind) / getattr(b, kind) for a, b in zip(runs, plains)) for kind in ("wall", "cpu"))
        seconds, own = (statistics.median(getattr(a, kind) for a in runs) for kind in ("wall", "cpu"))
        tensors, peak = (statistics.median(getattr(a, kind) for a in runs) - getattr(without, kind) for kind in ("tensors", "peak"))
        yield f"| {name} | {runs[0].evaluations} | {seconds:.2f} ({own:.2f}) | {wall:.3f} | {cpu:.3f} | {tensors:.1f} | {peak:.0f} |"


def pairs_of(ways):
    """Every way once per round, forwards and backwards in turn: its runs, and the plain runs of the same rounds."""
    runs = {name: [] for name in ways}
    for i in range(pairs):
        for name in list(ways) if i % 2 == 0 else list(reversed(ways)):
            runs[name].append(run(ways[name]))
            print(f"round {i + 1}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return {name: (some, runs[PLAIN]) for name, some in runs.items()}


PLAIN = "plain KSampler"
with torch.inference_mode():
    base = build()
    calls = []
    base.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    plain = {PLAIN: lambda: case.stock(base, "euler")}
    run(plain[PLAIN])  # the first loads
    without = run(plain[PLAIN])
    tuned, unmatched = embedded.with_lora(base, tiny.random_lora(base, 5, ("to_q", "to_k", "to_v", "to_out.0")))
    assert unmatched == 0
    lora_mb = tensor_mb() - without.tensors
    measured = pairs_of(
        {
            **plain,
            "Combined KSampler, LoRA": lambda: case.combined(base, tuned, "euler"),
            "two chained KSamplerAdvanced": lambda: chained(base, tuned),
        }
    )
    switches = list(kept_or_not(base, tuned))
    second = build()
    second.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    name = "Combined KSampler, two checkpoints"
    measured[name] = pairs_of({**plain, name: lambda: case.combined(base, second, "euler")})[name]

sizes = f"tensors of the plain run {without.tensors:.1f} MB, the LoRA {lora_mb:.2f} MB"
print(f"{model_name}, {latent}×{latent} latents, {steps} steps, {pairs} pairs; {sizes}.\n")
print("\n".join(table(measured, without)), end="\n\n")
print("\n".join(switches))
