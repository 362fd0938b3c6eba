"""The losses that two revisions are compared on: every objective with guidance off and on, few sampler steps, two samples.

This file imports nothing of the trainer, so that drivers of all revisions can read it. Settings have the names of version 0.1.0, which
stay valid.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SAMPLES = 2
SEED = 5


@dataclass(frozen=True)
class Case:
    """An objective's settings, and the numbers of the micro-batches that its loss is computed on; the last loss is differentiated."""

    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batches: tuple[int, ...] = (0,)
    reward: str = "proxy"
    features: str = ""

    def rows(self, number: int) -> range:
        """Sample numbers of a micro-batch."""
        return range(number * SAMPLES, (number + 1) * SAMPLES)


_REFL = {"steps": 5, "grad_from": 2, "grad_to": 4}
_IMAGES = {"steps": 6, "grad_from": 4, "grad_to": 5, "start_from": 3, "start_to": 4}
_DIRECT = {"steps": 3, "sigma_high": 0.9, "sigma_low": 0.4}
_WORDS = {"positive": ["crisp", "vivid"], "negative": ["blurred", "pale"]}
_SQDF = {"steps": 4, "buffer_gb": 1e-5, "alpha": 0.01}
_ORACLE = {**_SQDF, "steps": 3, "queries": [4, 3], "updates_per_loop": 1, "heads": 2, "epochs": 3}

CASES: dict[str, Case] = {
    "refl": Case("refl", _REFL),
    "refl, guidance 2, KL, threshold": Case(
        "refl", {**_REFL, "guidance": 2.0, "kl_weight": 0.3, "threshold": 2.0, "per_sample": False, "eta": 0.5}
    ),
    "imagerefl": Case("imagerefl", _IMAGES),
    "imagerefl, guidance 2, KL": Case("imagerefl", {**_IMAGES, "guidance": 2.0, "kl_weight": 0.3, "diffusion_weight": 0.1}, (2,)),
    "imagerefl, from noise": Case("imagerefl", _IMAGES, (3,)),
    "draft-k": Case("draft-k", {"steps": 4, "k": 2, "guidance": 1.0}),
    "draft-k, guidance 2, noise": Case("draft-k", {"steps": 4, "k": 3, "guidance": 2.0, "eta": 1.0, "recompute": False}),
    "draft-lv": Case("draft-lv", {"steps": 4, "samples": 1, "guidance": 1.0}),
    "draft-lv, guidance 2": Case("draft-lv", {"steps": 4, "k": 2, "samples": 1, "guidance": 2.0, "threshold": 2.0}),
    "alignprop": Case("alignprop", {"steps": 4, "cut_mean": 2.0, "cut_std": 1.0, "guidance": 1.0}, (1,)),
    "alignprop, guidance 2": Case("alignprop", {"steps": 4, "cut_mean": 2.0, "cut_std": 0.0, "guidance": 2.0, "recompute": False}),
    "drtune": Case("drtune", {"steps": 4, "k": 2, "early_stop": 2, "guidance": 1.0}),
    "drtune, guidance 2": Case("drtune", {"steps": 4, "k": 2, "early_stop": 3, "guidance": 2.0, "eta": 1.0}, (1,)),
    "direct-align": Case("direct-align", _DIRECT),
    "direct-align, guidance 2, images": Case(
        "direct-align", {**_DIRECT, "guidance": 2.0, "source": "offline", "branch": "both", "levels": 2, "discount": 0.5, "shift": 2.0}
    ),
    "srpo": Case("srpo", {**_DIRECT, **_WORDS}),
    "srpo, guidance 2": Case("srpo", {**_DIRECT, **_WORDS, "guidance": 2.0, "branch": "both", "eta": 1.0}, (1,)),
    "sqdf": Case("sqdf", {**_SQDF, "guidance": 1.0, "collect_every": 2}, (0, 1)),
    "sqdf, guidance 2, consistency": Case("sqdf", {**_SQDF, "guidance": 2.0, "estimator": "consistency", "replay": "prioritised"}, (0, 1)),
    "sqdf, no buffer": Case("sqdf", {**_SQDF, "buffer_gb": 0.0, "guidance": 1.0}),
    "sqdf-black-box": Case("sqdf-black-box", {**_ORACLE, "guidance": 1.0}, (0, 1), "gold", "heldout"),
    "sqdf-black-box, guidance 2, UCB": Case(
        "sqdf-black-box", {**_ORACLE, "guidance": 2.0, "optimism": "ucb", "ucb_weight": 0.5}, (0,), "gold", "heldout"
    ),
}


def figures(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Loss, logs, and the gradient's norm and inner products with eight fixed random directions."""
    gradient = {key: value.double() for key, value in sorted(values.items()) if key.startswith("gradient ")}

    def direction(j: int, key: str, value: Tensor) -> Tensor:
        seeded = torch.Generator().manual_seed(zlib.crc32(f"{j} {key}".encode()))
        return torch.randn(value.shape, generator=seeded, dtype=torch.float64)

    return {
        "loss": float(values["loss"]),
        "logs": {key.removeprefix("log "): value.tolist() for key, value in sorted(values.items()) if key.startswith("log ")},
        "norm": float(torch.stack([value.norm() for value in gradient.values()]).norm()),
        "projections": [sum(float((g * direction(j, key, g)).sum()) for key, g in gradient.items()) for j in range(8)],
    }


def write(run: Callable[[Case], Mapping[str, Tensor]]) -> None:
    """Run a driver over all cases and write its values (OUT.safetensors) or their figures (OUT.json): `python -m DRIVER LORA OUT`."""
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    found = {name: run(case) for name, case in CASES.items()}
    if out.suffix == ".json":
        out.write_text(json.dumps({name: figures(values) for name, values in found.items()}, indent=1) + "\n", "utf-8")
    else:
        save_file({f"{name}: {key}": v.double().contiguous() for name, values in found.items() for key, v in values.items()}, out)
