"""What a search costs beside model, decoder and reward calls, at SD1.5's latents: all three are free here.

    python -m tools.search_overhead

Processor time of one search of 20 steps with 16 candidates of 4×64×64, and what a plain trajectory of the same candidates takes.
"""

from __future__ import annotations

import statistics
import time

import torch

from trainer.sampling import end_of, trajectory
from trainer.search.loop import ancestral, particle_noise, search_images
from trainer.search.plan import fitted, rounds_of
from trainer.search.settings import METHODS, search_of

STEPS, CANDIDATES, SHAPE, REPEATS = 20, 16, (4, 64, 64), 5


def main() -> None:
    """Print a row for each method: milliseconds, of which drawing noise, and model calls."""
    torch.set_num_threads(1)
    sigmas = torch.cat([torch.logspace(1.16, -1.5, STEPS), torch.zeros(1)])
    noise = particle_noise(0, 1, SHAPE)
    start = noise(-1, range(CANDIDATES)) * sigmas[0]

    def model(i: int, x: torch.Tensor) -> torch.Tensor:
        return x  # no copy: a denoiser that costs nothing

    def score(latents: torch.Tensor) -> torch.Tensor:
        return latents[:, 0, 0, 0]

    def plain() -> int:
        end_of(start, trajectory(lambda x, sigma: x, start, sigmas, lambda i: noise(i, range(CANDIDATES))))
        return CANDIDATES * STEPS

    def search(name: str) -> int:
        planned = fitted(search_of(name, {}), STEPS, CANDIDATES * STEPS)
        rounds = rounds_of(planned, STEPS)
        states = start[torch.arange(rounds[0].rows) % CANDIDATES]
        return search_images(planned, rounds, sigmas, states, model, ancestral(sigmas, noise), score).counts.model

    print("| | ms a search | ms a candidate and step | model calls |\n|---|---|---|---|")
    for name in ("plain trajectory", *METHODS):
        calls, times = 0, list[float]()
        for _ in range(REPEATS):
            begin = time.process_time()
            calls = plain() if name not in METHODS else search(name)
            times.append(1000 * (time.process_time() - begin))
        print(f"| {name} | {statistics.median(times):.0f} | {statistics.median(times) / calls:.2f} | {calls} |")
    begin = time.process_time()
    for i in range(STEPS):
        noise(i, range(CANDIDATES))
    print(f"\nof which drawing the noise of {STEPS} steps: {1000 * (time.process_time() - begin):.0f} ms")


if __name__ == "__main__":
    main()
