# SPDX-License-Identifier: Apache-2.0
"""How a run is spread over processes: what a launcher has started, and what Lightning's Trainer is told of it.

    torchrun --nproc-per-node 2 -m omniq quantize --config run.yaml

``fabric run`` and SLURM's ``srun`` work alike. The launcher decides how many processes there are, and the Trainer takes
that number unless it was given one; another number is refused, because Lightning would then make independent runs of
them, all of which write to the same folder. omniq starts no processes itself.
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

# The longest wait for a peer: the first process digests the whole model file before the others may go on.
PATIENCE = timedelta(minutes=30)
_TELL_AFTER = 5.0  # seconds of waiting until a process says for whom

log = logging.getLogger("omniq")


class BlockParallel(DDPStrategy):
    """Lightning's DDP; a stage that learns nothing by gradients is left alone, and sums what it gathers by itself."""

    def __init__(self) -> None:
        # Buffers are alike in all processes and may be as large as the weights: DDP would send them round every step.
        named = signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # until torch 2.13
        more: dict[str, Any] = {buffers: False}
        super().__init__(timeout=PATIENCE, **more)

    @override
    def configure_ddp(self) -> None:
        if self.model is not None and any(value.requires_grad for value in self.model.parameters()):
            super().configure_ddp()


def started() -> tuple[int, int]:
    """Processes that a launcher has started, and how many of them on this machine; 1 and 1 without one."""
    by_torch = {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys()  # torchrun and fabric run, also inside SLURM
    if "SLURM_NTASKS" in os.environ and not by_torch and SLURMEnvironment.detect():
        total = int(os.environ["SLURM_NTASKS"])
        return total, total // int(os.environ.get("SLURM_NNODES", 1))
    # NOTE: the group counts once there is one: Lightning may delete WORLD_SIZE after a fit, and the next fit of each
    # process would be a run of its own.
    total = max(collectives.world_size(), int(os.environ.get("WORLD_SIZE", 1)))
    return total, int(os.environ.get("LOCAL_WORLD_SIZE", total))


def check_launcher() -> None:
    """Refuse an environment that announces processes which nobody has started: this one would wait for them.

    Raises:
        UserError: a batch script of SLURM runs omniq without ``srun``, or ``WORLD_SIZE`` is left from another program.
    """
    total, _ = started()
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
    """Arguments of the Trainer that follow from the launcher, where the user has not given them.

    Left to itself, Lightning would take every GPU of the machine.

    Args:
        given: the user's arguments of the Trainer.

    Raises:
        UserError: a strategy that would share the model, not the samples.
    """
    total, local = started()
    arguments: dict[str, Any] = {}
    if given.get("devices") in (None, "auto"):
        arguments["devices"] = local
        if total > local and given.get("num_nodes") in (None, 1):
            arguments["num_nodes"] = total // local
    strategy = given.get("strategy")
    if strategy not in (None, "auto", "ddp") and not (total == 1 and isinstance(strategy, SingleDeviceStrategy)):
        number = "several processes, which share" if total > 1 else "omniq, where several processes share"
        raise UserError(f"trainer.strategy {strategy!r} does not go with {number} samples, not the model: leave it out")
    if total > 1:
        arguments["strategy"] = BlockParallel()
    elif strategy == "ddp":
        arguments["strategy"] = "auto"  # one process shares with nobody, and Lightning's DDP needs gradients
    return arguments


def join(trainer: L.Trainer, given: Mapping[str, Any]) -> None:
    """Meet the other processes, once it is sure that the Trainer means as many as there are.

    Raises:
        UserError: it does not.
    """
    total, _ = started()
    meant = trainer.num_devices * trainer.num_nodes  # NOTE: not world_size, which may be what the launcher says
    if meant != total:
        nodes = trainer.num_nodes
        asked = f"trainer.num_nodes {nodes}" if nodes > 1 else f"trainer.devices {given.get('devices')}"
        if nodes > 1 and trainer.num_devices > 1:
            asked += f" of {trainer.num_devices} devices"
        means = f"{asked} means {meant} process(es)"
        if total > 1:
            raise UserError(f"{means}, but {total} were started: leave it out, or start {meant}")
        start = (f"--nnodes {nodes} " if nodes > 1 else "") + f"--nproc-per-node {trainer.num_devices}"
        raise UserError(f"{means}, but one was started: run torchrun {start} -m omniq quantize …, or set it to 1")
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
            number, place, total - 1, total, PATIENCE.total_seconds() // 60,
        )  # fmt: skip

    timer = threading.Timer(_TELL_AFTER, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
