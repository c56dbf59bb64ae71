# SPDX-License-Identifier: Apache-2.0
"""Collectives: the rank of this process, and the communication between the processes of one run.

A run is data-parallel. Of ``N`` processes, rank ``r`` holds the samples ``r, r + N, r + 2 N, …``. One step of all
processes with ``b`` samples each therefore sees the samples of one step with ``N b`` samples in a single process. DDP
averages gradients. ``all_reduce_sum`` adds sums over tokens (Gram matrices, importances). Rows of a layer that can be
solved independently are divided among the processes (``local_rows``) and gathered. Everything else is computed
identically on all ranks, or only on rank 0, which also writes all files and broadcasts the result.

All functions are no-ops in a single process. With several processes, Lightning's strategy creates the process group
from the environment of the launcher (``torchrun``, ``fabric run``, SLURM). Its timeout is finite, so a process fails
if another process has ended.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from omniq.errors import ErrorOnRank0, UserError

Value = TypeVar("Value")

_DONE = "omniq/done"  # key of the store: the outcome of the work that rank 0 did alone
_ENDLESS = timedelta(days=30)


@dataclass(frozen=True)
class _Outcome:
    """The outcome of work on rank 0: a value, or the text of a ``UserError``."""

    value: object = None
    error: str | None = None


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Return the rank of this process, counted from 0."""
    return dist.get_rank() if _is_distributed() else 0


def local_shard(samples: Tensor) -> Tensor:
    """Return this process's shard of a tensor with one entry per sample: every ``N``-th entry."""
    return samples[rank() :: world_size()]


def local_rows(rows: int) -> slice:
    """Return this process's share of ``rows`` rows: a contiguous slice. Sizes of shares differ by at most one row."""
    return _share(rows, rank())


def all_gather_rows(share: Tensor, rows: int) -> Tensor:
    """Gather the shares ``local_rows(rows)`` of all processes into all rows in order, ``[rows, …]``."""
    if not _is_distributed():
        return share
    room = -(-rows // world_size())
    padded = share.new_zeros(room, *share.shape[1:], device=_device())
    padded[: len(share)] = share
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    shares = (_share(rows, number) for number in range(world_size()))
    return torch.cat([part[: its.stop - its.start] for part, its in zip(parts, shares, strict=True)]).to(share.device)


def _share(rows: int, number: int) -> slice:
    """Return the rows of rank ``number``."""
    return slice(rows * number // world_size(), rows * (number + 1) // world_size())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if _is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over all processes, in place, and return it."""
    if _is_distributed():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_ranks(flag: bool) -> bool:
    """Return whether the flag is true on every process."""
    if not _is_distributed():
        return flag
    unset = torch.tensor(int(not flag), device=_device())
    return int(all_reduce_sum(unset)) == 0


def broadcast_from_rank0(work: Callable[[], Value]) -> Value:
    """Call ``work`` on rank 0 only, and return its value on all ranks.

    Raises:
        UserError: on rank 0, if ``work`` raised it.
        ErrorOnRank0: on the other ranks, if ``work`` raised a ``UserError`` on rank 0.
    """
    if not _is_distributed():
        return work()
    outcome: list[_Outcome] = [_Outcome()]
    error: UserError | None = None
    if rank() == 0:
        try:
            outcome = [_Outcome(work())]
        except UserError as found:
            error, outcome = found, [_Outcome(error=str(found))]
    dist.broadcast_object_list(outcome, src=0, device=_device())
    if error is not None:
        raise error
    if outcome[0].error is not None:
        raise ErrorOnRank0(outcome[0].error)
    value: Value = outcome[0].value  # type: ignore[assignment]
    return value


def error_on_rank0(message: str) -> UserError:
    """Make the exception for an error that all processes detect: each raises it, and only rank 0 prints the message."""
    return UserError(message) if rank() == 0 else ErrorOnRank0(message)


def finish_on_rank0(rest: Callable[[], None] = lambda: None) -> None:
    """Shut down the process group, call ``rest`` on rank 0, and return on all ranks when it is done.

    ``rest`` may take longer than the timeout of the process group. The other ranks therefore wait at the store of the
    rendezvous. The store lives in the launcher, which ends them if rank 0 dies, or in rank 0.

    Raises:
        UserError: on rank 0, if ``rest`` raised it.
        ErrorOnRank0: on the other ranks, if ``rest`` raised a ``UserError`` on rank 0.
    """
    if not _is_distributed():
        rest()
        return
    store, number = dist.distributed_c10d._get_default_store(), rank()
    read = [f"{_DONE}/{other}" for other in range(1, world_size())]
    dist.barrier()
    dist.destroy_process_group()
    if number == 0:
        try:
            rest()
        except UserError as error:
            _release_others(store, str(error), read)
            raise
        _release_others(store, "", read)
    else:
        store.wait([_DONE], _ENDLESS)
        message = store.get(_DONE).decode()
        store.set(read[number - 1], "")
        if message:
            raise ErrorOnRank0(message)


def _release_others(store: dist.Store, message: str, read: list[str]) -> None:
    """Release the other ranks, and wait until they have read the message: the store may end with this process."""
    store.set(_DONE, message)
    with suppress(dist.DistStoreError):  # a rank that does not read it within a minute has ended
        store.wait(read, timedelta(minutes=1))
    for key in (_DONE, *read):  # otherwise the next run in these processes reads them
        store.delete_key(key)


def all_gather_samples(share: Tensor) -> Tensor:
    """Gather the shards ``[n, …]`` of all processes into all samples in order, ``[N n, …]``."""
    if not _is_distributed():
        return share
    share = share.to(_device()).contiguous()
    parts = [torch.empty_like(share) for _ in range(world_size())]
    dist.all_gather(parts, share)
    return torch.stack(parts, 1).flatten(0, 1)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Return the device of the tensors that this process group communicates."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
