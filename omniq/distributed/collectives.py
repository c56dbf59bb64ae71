# SPDX-License-Identifier: Apache-2.0
"""Several processes that work on one run: who this one is, and the few things they tell each other.

A run is data-parallel. Of ``N`` processes, number ``r`` holds the samples ``r, r + N, r + 2 N, …``, so that one step of
all of them, with ``b`` samples each, sees the samples that one process would see in a step of ``N b``. Gradients are
averaged by DDP; sums over tokens (Gram matrices, importances) go through ``all_reduce_sum``; rows of a layer that are
solved without the others are shared (``local_rows``) and then gathered; everything else is either computed alike by all
or by the first process alone, which also writes all files, and told to the others.

With one process nothing here does anything. With several, Lightning's strategy makes the process group, from whatever
started them (``torchrun``, ``fabric run``, SLURM); its timeout is finite, so a process whose peer is gone fails.
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

_DONE = "omniq/done"  # key of the store: what came of the work that the first process did by itself
_ENDLESS = timedelta(days=30)


@dataclass(frozen=True)
class _Outcome:
    """What the first process found: a value, or the text of a ``UserError``."""

    value: object = None
    error: str | None = None


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def local_shard(samples: Tensor) -> Tensor:
    """This process' share of something that has an entry a sample: every ``N``-th."""
    return samples[rank() :: world_size()]


def local_rows(rows: int) -> slice:
    """This process' share of so many rows: neighbours, and as many as the others have, or one less."""
    return _share(rows, rank())


def all_gather_rows(share: Tensor, rows: int) -> Tensor:
    """All rows in their order, ``[rows, …]``, of the shares ``local_rows(rows)`` of all processes."""
    if not _several():
        return share
    room = -(-rows // world_size())
    padded = share.new_zeros(room, *share.shape[1:], device=_device())
    padded[: len(share)] = share
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    shares = (_share(rows, number) for number in range(world_size()))
    return torch.cat([part[: its.stop - its.start] for part, its in zip(parts, shares, strict=True)]).to(share.device)


def _share(rows: int, number: int) -> slice:
    """The rows of process ``number``."""
    return slice(rows * number // world_size(), rows * (number + 1) // world_size())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes; the tensor is changed in place and returned."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest over all processes, entry by entry; the tensor is changed in place and returned."""
    if _several():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_ranks(flag: bool) -> bool:
    """Whether the flag is set in every process."""
    if not _several():
        return flag
    unset = torch.tensor(int(not flag), device=_device())
    return int(all_reduce_sum(unset)) == 0


def broadcast_from_rank0(work: Callable[[], Value]) -> Value:
    """What ``work`` returns in the first process, told to all; the others do not call it.

    Raises:
        UserError: in the first process, whatever ``work`` raised.
        ToldElsewhere: in the others, when the first has raised a ``UserError``.
    """
    if not _several():
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
    """A mistake that all processes meet alike, for each of them to raise: only the first one says it."""
    return UserError(message) if rank() == 0 else ErrorOnRank0(message)


def finish_on_rank0(rest: Callable[[], None] = lambda: None) -> None:
    """Leave the other processes when there is nothing more to do together; all return when the first has done the rest.

    That may take longer than any exchange may. So the group is left, and the others wait at the store through which
    they have met: it lives in the launcher, which ends them if the first one dies, or in the first process.

    Raises:
        UserError: in the first process, whatever ``rest`` raised.
        ToldElsewhere: in the others, when the first has raised a ``UserError``.
    """
    if not _several():
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
            _tell(store, str(error), read)
            raise
        _tell(store, "", read)
    else:
        store.wait([_DONE], _ENDLESS)
        message = store.get(_DONE).decode()
        store.set(read[number - 1], "")
        if message:
            raise ErrorOnRank0(message)


def _tell(store: dist.Store, message: str, read: list[str]) -> None:
    """Let the others go, and stay until they have read it: the store may end with this process."""
    store.set(_DONE, message)
    with suppress(dist.DistStoreError):  # who has not read it in a minute is gone
        store.wait(read, timedelta(minutes=1))
    for key in (_DONE, *read):  # or the next run in these processes would find them
        store.delete_key(key)


def all_gather_samples(share: Tensor) -> Tensor:
    """All samples in their order, ``[N n, …]``, of the shares ``[n, …]`` of all processes."""
    if not _several():
        return share
    share = share.to(_device()).contiguous()
    parts = [torch.empty_like(share) for _ in range(world_size())]
    dist.all_gather(parts, share)
    return torch.stack(parts, 1).flatten(0, 1)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Where this process group takes its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
