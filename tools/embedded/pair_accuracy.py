"""How often a LoRA prefers the better image of pairs: the accuracy that Diffusion-DPO raises, on pairs that it was not trained on.

Usage: PYTHONPATH=. python tools/embedded/pair_accuracy.py TABLE FIGURE LORA [LORA …]. A pair is in order where the tuned model's
denoising error of the better image, minus the base's, is below that of the worse one, averaged over 32 noise levels and noises, the same
for every LoRA.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.batches import Pairs
from trainer.data.samples import Samples, load_samples
from trainer.demo.experiment import load_base
from trainer.lora.file import load_lora
from trainer.models.unet import UNetPolicy
from trainer.objectives import OBJECTIVES, RunContext
from trainer.objectives.preference.errors import mean_square

DRAWS, BATCH = 32, 32


@torch.no_grad()
def gains(policy: UNetPolicy, samples: Samples) -> Tensor:
    """Mean over draws of (L_l − L_w) − (L_l − L_w of the base), (N,) per pair."""
    objective = OBJECTIVES["diffusion-dpo"]()
    context, number = RunContext(policy, None), len(samples.prompts)
    total, seen = torch.zeros(number, dtype=torch.float64), torch.zeros(number)
    for step in range(DRAWS):
        for first in range(0, number, BATCH):
            rows = torch.arange(first, min(first + BATCH, number))
            part = Samples(tuple(samples.prompts[i] for i in rows.tolist()), samples.latents, samples.image[rows], samples.rejected[rows])
            batch = part.batch(0, step, 0, len(rows))  # a permutation of the rows
            assert isinstance(batch, Pairs)
            order = rows[torch.tensor([_place(part, batch, i) for i in range(len(rows))])]
            noised, prompts = objective.noised(context, batch), list(batch.prompts)
            both = (batch.chosen, batch.rejected)
            tuned, base = (noised.two(both, (prompts, prompts), adapter) for adapter in ("tuned", "base"))
            difference = mean_square(tuned[1]) - mean_square(tuned[0]) - mean_square(base[1]) + mean_square(base[0])
            total[order] += difference.double()
            seen[order] += 1
    assert bool((seen == DRAWS).all())
    return total / DRAWS


def _place(part: Samples, batch: Pairs, i: int) -> int:
    """The row of sample i of a batch: prompts differ, as each has one pair."""
    return part.prompts.index(batch.prompts[i])


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n."""
    centre, half = (share + 1.92 / n) / (1 + 3.84 / n), 1.96 * ((share * (1 - share) + 0.96 / n) / n) ** 0.5 / (1 + 3.84 / n)
    return centre - half, centre + half


def plot(rows: list[tuple[str, float, int]], file: Path) -> None:
    """Accuracy and interval of each LoRA, by its name."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3), dpi=110, layout="constrained")
    panel = drawn.subplots()
    for i, (_, share, n) in enumerate(rows):
        low, high = interval(share, n)
        panel.errorbar(i, share, [[share - low], [high - share]], fmt="o", color="#2a6f97", capsize=4)
    panel.axhline(0.5, color="#999999", linestyle="--", label="chance")
    panel.set_xticks(range(len(rows)), [name for name, _, _ in rows])
    panel.set_ylim(0.4, 1)
    panel.set_ylabel("held-out pairs in order")
    panel.legend(fontsize=8)
    drawn.savefig(file)


def main(table: str, figure: str, loras: list[str]) -> None:
    """Print one row per LoRA: accuracy with its 95 % interval over pairs, and the mean gain in units of its standard error; draw them."""
    print("| LoRA | pairs in order | 95 % interval | mean gain / its standard error |\n|---|---|---|---|")
    rows: list[tuple[str, float, int]] = []
    for lora in loras:
        policy = load_base()
        load_lora(policy, Path(lora))
        found = gains(policy, load_samples(policy, "", "", (policy.image_size,), pairs=table))
        share, n = float((found > 0).double().mean()), len(found)
        rows.append((Path(lora).stem, share, n))
        low, high = interval(share, n)
        t = float(found.mean() / (found.std() / n**0.5))
        print(f"| {Path(lora).name} | {share:.3f} of {n} | {low:.3f} to {high:.3f} | {t:.1f} |", flush=True)
    plot(rows, Path(figure))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
