# SPDX-License-Identifier: Apache-2.0
"""The launcher: the processes that it started, and the Trainer arguments that follow from it.

    torchrun --nproc-per-node 2 -m omniq quantize --config run.yaml

``fabric run`` and SLURM's ``srun`` work in the same way. The launcher decides the number of processes, and the Trainer
uses that number by default. A different number is refused, because Lightning would then treat the processes as
independent runs that write to the same folder. omniq itself starts no processes.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from omniq.distributed import collectives
from omniq.errors import UserError

# Timeout of a collective. It is long because rank 0 hashes the whole model file while the other ranks wait.
TIMEOUT = timedelta(minutes=30)
_TELL_AFTER = 5.0  # seconds of waiting until a process says for whom

log = logging.getLogger("omniq")


class BlockParallel(DDPStrategy):
    """Lightning's DDP. It does not wrap a stage without gradients, which uses the collectives itself."""

    def __init__(self) -> None:
        # Buffers are equal on all ranks and may be as large as the weights. DDP would broadcast them in every step.
        named = signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # until torch 2.13
        more: dict[str, Any] = {buffers: False}
        super().__init__(timeout=TIMEOUT, **more)

    @override
    def configure_ddp(self) -> None:
        if self.model is not None and any(value.requires_grad for value in self.model.parameters()):
            super().configure_ddp()


def launched_processes() -> tuple[int, int]:
    """Return the numbers of launched processes, in total and on this machine; 1 and 1 without a launcher."""
    by_torch = {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys()  # torchrun and fabric run, also inside SLURM
    if "SLURM_NTASKS" in os.environ and not by_torch and SLURMEnvironment.detect():
        total = int(os.environ["SLURM_NTASKS"])
        return total, total // int(os.environ.get("SLURM_NNODES", 1))
    # NOTE: an existing process group takes precedence: Lightning may delete WORLD_SIZE after a fit, and the next fit of
    # each process would then be an independent run.
    total = max(collectives.world_size(), int(os.environ.get("WORLD_SIZE", 1)))
    return total, int(os.environ.get("LOCAL_WORLD_SIZE", total))


def check_launcher() -> None:
    """Refuse an environment that announces processes which nobody has started: this one would wait for them.

    Raises:
        UserError: a batch script of SLURM runs omniq without ``srun``, or ``WORLD_SIZE`` is left from another program.
    """
    total, _ = launched_processes()
    if total == 1 or collectives.world_size() > 1:
        return
    if "SLURM_NTASKS" in os.environ and not {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys():
        if not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
            raise UserError(
                f"SLURM_NTASKS {total}: the batch script runs this one process, and the others are not started: write "
                "`srun omniq …` in it, or ask SLURM for one task (--ntasks 1)"
            )
        return
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise UserError(
            f"WORLD_SIZE {total} is set without {', '.join(lacking)}, so no launcher has started this process: unset "
            f"WORLD_SIZE, or run torchrun --nproc-per-node {total} -m omniq quantize …"
        )


def launch_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer arguments that follow from the launcher, unless the user has set them.

    By default, Lightning would use every GPU of the machine.

    Args:
        given: the Trainer arguments that the user set.

    Raises:
        UserError: the strategy divides the model among the processes instead of the samples.
    """
    total, local = launched_processes()
    arguments: dict[str, Any] = {}
    if given.get("devices") in (None, "auto"):
        arguments["devices"] = local
        if total > local and given.get("num_nodes") in (None, 1):
            arguments["num_nodes"] = total // local
    strategy = given.get("strategy")
    if strategy not in (None, "auto", "ddp") and not (total == 1 and isinstance(strategy, SingleDeviceStrategy)):
        raise UserError(
            f"trainer.strategy {strategy!r} is not supported, because omniq divides the samples among processes, not "
            "the model: remove it"
        )
    if total > 1:
        arguments["strategy"] = BlockParallel()
    elif strategy == "ddp":
        arguments["strategy"] = "auto"  # a single process needs no DDP, and Lightning's DDP requires gradients
    return arguments


def set_up_processes(trainer: L.Trainer, given: Mapping[str, Any]) -> None:
    """Set up the process group, after a check that the Trainer expects as many processes as were launched.

    Raises:
        UserError: the Trainer expects a different number.
    """
    total, _ = launched_processes()
    expected = trainer.num_devices * trainer.num_nodes  # NOTE: not world_size, which may come from the launcher
    if expected != total:
        nodes = trainer.num_nodes
        asked = f"trainer.num_nodes {nodes}" if nodes > 1 else f"trainer.devices {given.get('devices')}"
        if nodes > 1 and trainer.num_devices > 1:
            asked += f" of {trainer.num_devices} devices"
        setting = f"{asked} means {expected} process(es)"
        if total > 1:
            raise UserError(f"{setting}, but {total} were started: remove it, or start {expected}")
        start = (f"--nnodes {nodes} " if nodes > 1 else "") + f"--nproc-per-node {trainer.num_devices}"
        raise UserError(f"{setting}, but one was started: run torchrun {start} -m omniq quantize …, or set it to 1")
    if total > 1:
        with _telling_of_wait(total):
            trainer.strategy.setup_environment()


@contextmanager
def _telling_of_wait(total: int) -> Iterator[None]:
    """Warn if the other processes have not come after a few seconds."""

    def tell() -> None:
        number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
        place = f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '?')}"
        log.warning(
            "process %s waits at %s for the other %d of %d processes: start them too, or, if there are none, unset "
            "WORLD_SIZE and RANK; it gives up after %d minutes",
            number, place, total - 1, total, TIMEOUT.total_seconds() // 60,
        )  # fmt: skip

    timer = threading.Timer(_TELL_AFTER, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
