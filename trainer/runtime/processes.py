"""Several processes that train one model: each takes its share of every micro-batch, gradients are averaged, one writes.

Started by `torchrun` or `accelerate launch`, which say who is who in environment variables; started plainly, a run is alone
and nothing is set up. Every process makes the same sequence of `exchange` calls; one that fails puts its error where its
next value belongs, so that all of them stop there, wherever they are, and the error is said once.
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
_RESUME = "the last checkpoint is intact, go on with --resume"
# torch's own default for gloo: longer than a watch or a checkpoint of one process may keep the others waiting. A process that
# dies is noticed at once, through its closed connection; only one that hangs is waited for.
TIMEOUT = timedelta(minutes=30)
BUCKET = 64 * 2**20  # bytes of gradients that are averaged at a time: where every weight is tuned, a copy of all is much


class StoppedElsewhere(RuntimeError):
    """Another process failed, and has said why."""


class ProcessLost(ConnectionError):
    """Another process ended without a word, or hangs."""


class Processes:
    """This process among those of a run; alone, as here, every operation is the identity."""

    rank = 0
    count = 1
    sharded = False
    """Whether each process keeps a part of the frozen weights only: then all must evaluate the network equally often."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of `total` samples: contiguous, so that the parts in order of rank are the whole."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def exchange(self, value: T) -> list[T]:
        """Everyone's value, in order of rank; also the place where processes wait for each other."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        return any(self.exchange(flag))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes its mean over the processes."""
        return

    def device(self, name: str) -> str:
        """The device of this process; ValueError for one that is not there."""
        return check_device(name)

    def weights_mesh(self, device: torch.device) -> Any:
        """The processes as torch.distributed.fsdp.fully_shard wants them."""
        raise ValueError("one process has nobody to share weights with")


ALONE = Processes()


class Joined(Processes):
    """A process of several."""

    def __init__(self, rank: int, count: int, local_rank: int, sharded: bool = False) -> None:
        self.rank, self.count, self.local_rank, self.sharded = rank, count, local_rank, sharded
        self.waits_for_weights = False
        """Whether others may be waiting for a part of a weight, where no error reaches them but the end of this process."""

    def weights_mesh(self, device: torch.device) -> Any:
        """As above: in a group of its own, so that no part of a weight is ever taken for a value."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        self.waits_for_weights = True
        group: Any = dist.new_group()
        return DeviceMesh.from_group(group, device.type)

    def exchange(self, value: T) -> list[T]:
        """As above; raises StoppedElsewhere where another process failed, ProcessLost where one is gone."""
        gathered = self._tell(None, value)
        failed = [error for error, _ in gathered if error is not None]
        if failed:
            raise StoppedElsewhere(failed[0])
        return [value for _, value in gathered]  # pyright: ignore[reportReturnType]

    def fail(self, error: BaseException) -> bool:
        """Tell the others why this process stops; false where one before it has stopped for the same reason."""
        try:
            gathered = self._tell(str(error), None)
        except ProcessLost:
            return True
        return all(other != str(error) for other, _ in gathered[: self.rank])

    def _tell(self, error: str | None, value: T | None) -> list[tuple[str | None, T | None]]:
        import torch.distributed as dist

        gathered: list[tuple[str | None, T | None]] = [(None, None)] * self.count
        try:
            dist.all_gather_object(gathered, (error, value))
        except RuntimeError as lost:  # gloo's for a closed connection or a timeout
            raise ProcessLost(f"process {self.rank} of {self.count}: another one was killed, crashed or hangs; {_RESUME}") from lost
        return gathered

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """All-reduces of gradients in a row, some megabytes at a time.

        DistributedDataParallel would do nothing here: it hooks the forward of its wrapper, and objectives call the network
        inside it, several times a step and in several adapter states. A LoRA's gradients are small, and after the last
        micro-batch there is nothing left to overlap their exchange with.
        """
        for trained in _buckets(parameters):
            self._average(trained)

    def _average(self, trained: Sequence[nn.Parameter]) -> None:
        import torch.distributed as dist

        # an adapter that this process's samples did not reach has no gradient here, and may have one elsewhere
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if flat.device.type not in ("cpu", "cuda"):
            flat = flat.cpu()  # only gloo and nccl were joined
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
    """Parameters in order, in groups of at most `size` bytes, or of one."""
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
    """The processes that a launcher started with this one, or ALONE. An error that ends the block ends all of them."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch.distributed as dist

    # gloo carries values and errors, nccl gradients that lie on a GPU (gloo on systems without nccl: Windows)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as lost:
        raise ProcessLost(f"the {count} processes did not find each other: {lost}") from lost
    sharded = _asked(environment, "ACCELERATE_USE_FSDP")
    here = Joined(dist.get_rank(), count, int(environment.get("LOCAL_RANK", dist.get_rank())), sharded)
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        for strategy in ("DEEPSPEED", "MEGATRON_LM"):
            if _asked(environment, f"ACCELERATE_USE_{strategy}"):
                raise ValueError(f"{strategy} is not supported: launch with --multi_gpu, or with --use_fsdp to share frozen weights")
        if sharded and _asked(environment, "FSDP_OFFLOAD_PARAMS"):
            raise ValueError("FSDP's offloading is not supported: shared weights stay on their device (fsdp_offload_params = false)")
        try:
            yield here
        except RuntimeError as error:
            if not sharded or "gloo" not in str(error).lower():
                raise
            raise ProcessLost(f"process {here.rank} of {count}: another one was killed, crashed or hangs; {_RESUME}") from error
    except BaseException as error:
        silent = isinstance(error, StoppedElsewhere | ProcessLost) or not isinstance(error, Exception)  # or cannot be reported
        first = silent or here.waits_for_weights or here.fail(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends anyway, and has something to say before
        if not first:
            raise StoppedElsewhere(str(error)) from error
        raise
    else:
        signal.signal(signal.SIGTERM, previous)
    finally:
        dist.destroy_process_group()


def _asked(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def _terminated(*_: object) -> None:
    """A launcher ends what is left of a run in which one process died."""
    raise KeyboardInterrupt(f"another process ended, or the launcher was stopped; {_RESUME}")
