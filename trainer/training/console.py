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

    c, calls = run.config, run.counted.calls
    total, unit = (c.budget, "call") if c.budget else (c.steps, "step")
    first, times = run.step, list[float]()
    bar = tqdm(
        total=total, initial=calls if c.budget else first, unit=unit, desc=name or c.objective["name"], disable=not run.processes.main
    )
    with interruptible() as stopping, bar:
        for done in steps_until(run, stopping):
            figures = {"loss": done.loss, **done.logs}
            bar.set_postfix({name: f"{value:.3f}" for name, value in list(figures.items())[:3]})
            bar.update(run.counted.calls * run.processes.count - bar.n if c.budget else 1)
            times.append(time.monotonic())
            if len(times) == 3 and run.processes.main:
                ahead = c.steps - done.number
                if c.budget:
                    each = (run.counted.calls - calls) / 3
                    ahead = min(ahead, math.ceil((c.budget - run.counted.calls) / each))
                seconds = (times[2] - times[0]) / 2  # the first step also compiles and allocates
                left = f"; {ahead} steps left take about {duration(seconds * ahead)}" if ahead > 0 else ""
                bar.write(f"{seconds:.3g} s per step{left}")
            yield done


def duration(seconds: float) -> str:
    """1.5 h, 12 min, 40 s."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
