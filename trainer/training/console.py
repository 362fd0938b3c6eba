"""Taking the steps of a run: until a stop is asked for, and in a terminal with a progress bar and Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from .loop import Step
from .run import Run


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; a second one interrupts as usual."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopping
    finally:
        signal.signal(signal.SIGINT, previous)


def steps_until(run: Run, stopping: Callable[[], bool]) -> Iterator[Step]:
    """The steps of a run. Once `stopping()` is true in any process, the checkpoint is saved and they end early: `run.last` is False."""
    for done in run.steps():
        yield done
        if not run.last and run.processes.any(stopping()):
            run.save()
            return


def follow(run: Run, name: str = "") -> Iterator[Step]:
    """The steps of a run behind a progress bar; after the third one, the time per step and the time left. Ctrl-C as `steps_until`."""
    from tqdm import tqdm

    c, main = run.config, run.processes.main
    total, unit = (c.budget, "call") if c.budget else (c.steps, "step")
    start, times = _position(run), list[float]()
    bar = tqdm(total=total, initial=start, unit=unit, desc=name or c.objective["name"], disable=not main)
    with interruptible() as stopping, bar:
        for done in steps_until(run, stopping):
            bar.set_postfix({name: f"{value:.3f}" for name, value in [("loss", done.loss), *done.logs.items()][:3]})
            bar.update(_position(run) - bar.n)
            times.append(time.monotonic())
            if len(times) == 3 and main:
                ahead = min(c.steps - done.number, math.ceil(3 * (total - _position(run)) / (_position(run) - start)))
                seconds = (times[2] - times[0]) / 2  # the first step also compiles and allocates
                bar.write(f"{seconds:.3g} s per step; {ahead} steps left take about {tqdm.format_interval(seconds * ahead)}")
            yield done


def _position(run: Run) -> int:
    """Progress towards the budget, in function evaluations of all processes, or towards `steps`."""
    return run.counted.calls * run.processes.count if run.config.budget else run.step
