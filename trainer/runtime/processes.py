"""Several processes that train one model: each takes its share of every micro-batch, gradients are averaged, one writes.

`torchrun` and `accelerate launch` start them and pass rank and world size in environment variables; without a launcher there is one
process and nothing is initialised. Every process makes the same sequence of `exchange` calls. A process that fails sends its error in
place of its next value, so that all of them stop at that call and the error is printed once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from .device import check_device, device_count

T = TypeVar("T")
_RESUME = "what was saved before is intact, go on with --resume"
# torch's default for gloo; longer than an evaluation or a checkpoint of the main process. A process that dies is detected at once,
# by its closed connection; the timeout is for one that hangs.
TIMEOUT = timedelta(minutes=30)
BUCKET = 64 * 2**20  # bytes of gradients per all-reduce: with tune = full a copy of all of them would be large


class StoppedElsewhere(RuntimeError):
    """Another process failed, and has printed why."""


class ProcessLost(ConnectionError):
    """Another process was killed, crashed or hangs."""


class Processes:
    """The processes of a run, seen from one of them. This class is a run of one process: every operation is the identity."""

    rank = 0
    count = 1
    sharded = False
    """Whether each process holds a shard of the frozen weights (FSDP): then all must call the network equally often."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's indices among `total` samples: contiguous ranges, in order of rank."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, in order of rank; also a barrier."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return any(self.exchange(flag))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        return

    def device(self, name: str) -> str:
        """The device of this process; ValueError for one that is not there."""
        return check_device(name)

    def weights_mesh(self, device: torch.device) -> Any:
        """The DeviceMesh for torch.distributed.fsdp.fully_shard."""
        raise ValueError("sharded weights (FSDP) need several processes")


ALONE = Processes()


class Joined(Processes):
    """One of several processes."""

    def __init__(self, rank: int, count: int, local_rank: int, sharded: bool = False) -> None:
        self.rank, self.count, self.local_rank, self.sharded = rank, count, local_rank, sharded
        self.waits_for_weights = False
        """Whether others may be waiting in FSDP's collectives: an error reaches them only by the end of this process."""

    def weights_mesh(self, device: torch.device) -> Any:
        """As above, over a process group of its own: FSDP's messages never mix with `exchange`."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        self.waits_for_weights = True
        group: Any = dist.new_group()
        return DeviceMesh.from_group(group, device.type)

    def exchange(self, value: T) -> list[T]:
        """As above; raises StoppedElsewhere where another process failed, ProcessLost where one is gone."""
        results = self._gather(None, value)
        failed = [error for error, _ in results if error is not None]
        if failed:
            raise StoppedElsewhere(failed[0])
        return [value for _, value in results]  # pyright: ignore[reportReturnType]

    def fail(self, error: BaseException) -> bool:
        """Send an error to the others; False where a process of lower rank fails with the same one, and prints it."""
        try:
            results = self._gather(str(error), None)
        except ProcessLost:
            return True
        return all(other != str(error) for other, _ in results[: self.rank])

    def _gather(self, error: str | None, value: T | None) -> list[tuple[str | None, T | None]]:
        import torch.distributed as dist

        results: list[tuple[str | None, T | None]] = [(None, None)] * self.count
        try:
            dist.all_gather_object(results, (error, value))
        except RuntimeError as lost:  # gloo's for a closed connection or a timeout
            raise ProcessLost(f"process {self.rank} of {self.count}: another one was killed, crashed or hangs; {_RESUME}") from lost
        return results

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """All-reduce the gradients, at most BUCKET bytes at a time.

        DistributedDataParallel does not fit: it hooks one forward of its wrapper, and objectives call the network several times
        per step, with several adapters. A LoRA's gradients are small, and after the last micro-batch no computation is left to
        overlap with.
        """
        for trained in _buckets(parameters):
            self._average(trained)

    def _average(self, trained: Sequence[nn.Parameter]) -> None:
        import torch.distributed as dist

        # a parameter without a gradient here may have one in another process
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if flat.device.type not in ("cpu", "cuda"):
            flat = flat.cpu()  # the process group has only gloo and nccl
        try:
            dist.all_reduce(flat)
        except RuntimeError as lost:
            raise ProcessLost(f"process {self.rank} of {self.count}: gradients could not be averaged ({lost}); {_RESUME}") from lost
        for parameter, mean in zip(trained, (flat / self.count).split([g.numel() for g in gradients])):
            parameter.grad = mean.view_as(parameter).to(parameter)

    def device(self, name: str) -> str:
        """`cuda` becomes `cuda:<local rank>`."""
        if name not in ("cuda", "xpu"):
            return super().device(name)
        available = device_count(name)
        if self.local_rank >= available:
            raise ValueError(f"process {self.local_rank} of this machine has no {name} device: {available} found; start fewer processes")
        getattr(torch, name).set_device(self.local_rank)
        return f"{name}:{self.local_rank}"


def _buckets(parameters: Iterable[nn.Parameter], size: int = BUCKET) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, in groups of at most `size` bytes or of one parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.nbytes for p in bucket) + parameter.nbytes > size:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def joined(timeout: timedelta = TIMEOUT, environment: Mapping[str, str] = os.environ) -> Generator[Processes]:
    """The processes that the launcher started, or ALONE. An error that leaves the block in one process ends all of them."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch.distributed as dist

    # gloo for values and errors, nccl for gradients on a GPU (gloo where nccl is missing: Windows)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as lost:
        raise ProcessLost(f"the {count} processes did not find each other: {lost}") from lost
    sharded = _is_set(environment, "ACCELERATE_USE_FSDP")
    here = Joined(dist.get_rank(), count, int(environment.get("LOCAL_RANK", dist.get_rank())), sharded)
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        for strategy in ("DEEPSPEED", "MEGATRON_LM"):
            if _is_set(environment, f"ACCELERATE_USE_{strategy}"):
                raise ValueError(f"{strategy} is not supported: launch with --multi_gpu, or with --use_fsdp to share frozen weights")
        if sharded and _is_set(environment, "FSDP_OFFLOAD_PARAMS"):
            raise ValueError("FSDP's offloading is not supported: shared weights stay on their device (fsdp_offload_params = false)")
        try:
            yield here
        except RuntimeError as error:
            if not sharded or "gloo" not in str(error).lower():
                raise
            raise ProcessLost(f"process {here.rank} of {count}: another one was killed, crashed or hangs; {_RESUME}") from error
    except BaseException as error:
        known = isinstance(error, StoppedElsewhere | ProcessLost) or not isinstance(error, Exception)  # to the others, or not theirs
        first = known or here.waits_for_weights or here.fail(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may end this process before it has printed its error
        if not first:
            raise StoppedElsewhere(str(error)) from error
        raise
    else:
        signal.signal(signal.SIGTERM, previous)
    finally:
        dist.destroy_process_group()


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def _terminated(*_: object) -> None:
    """The launcher ends the other processes of a run in which one died."""
    raise KeyboardInterrupt(f"another process ended, or the launcher was stopped; {_RESUME}")
