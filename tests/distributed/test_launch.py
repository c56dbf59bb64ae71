# SPDX-License-Identifier: Apache-2.0
"""Arguments of the Trainer under a launcher, and combinations that are refused."""

import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from omniq.distributed import collectives, launch
from omniq.distributed.launch import BlockParallel, check_launcher, launch_arguments, set_up_processes
from omniq.errors import UserError
from omniq.run.checks import check_divisible


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, {"devices": 1}),
        ({}, {"devices": 2}, {}),
        ({}, {"strategy": "ddp"}, {"devices": 1}),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, {"devices": "auto"}, {"devices": 4}),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"num_nodes": 1}, {"devices": 2, "num_nodes": 2}),
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}, {}, {"devices": 3, "num_nodes": 2}),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "interactive"}, {}, {"devices": 1}),
        ({"SLURM_NTASKS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, {}, {"devices": 2}),
    ],
)
def test_launch_arguments_follow_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = launch_arguments(given)
    strategy = found.pop("strategy", "auto")
    assert found == expected
    assert isinstance(strategy, BlockParallel) == (len(environment) > 0 and "devices" in found and found["devices"] > 1)
    assert isinstance(strategy, BlockParallel) or strategy == "auto"


VARIABLES = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME", "SLURM_STEP_ID", "SLURM_STEPID"),
)
BATCH = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}
MET = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables of any launcher."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (BATCH, "SLURM_NTASKS 4: the batch script runs this one process.*write `srun omniq"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE 4 is set without RANK, MASTER_ADDR, MASTER_PORT, .*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE 2 is set without MASTER_ADDR, MASTER_PORT, .*unset WORLD_SIZE"),
        (BATCH | {"WORLD_SIZE": "4"}, "WORLD_SIZE 4 is set without RANK"),
    ],
)
def test_check_launcher_without_other_processes_is_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launcher()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4", **MET},
        BATCH | {"SLURM_NTASKS": "1"},
        BATCH | {"SLURM_STEP_ID": "0"},
        BATCH | {"SLURM_JOB_NAME": "interactive"},
        BATCH | {"WORLD_SIZE": "4", **MET},
    ],
)
def test_check_launcher_with_started_processes_passes(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    check_launcher()


def test_join_without_the_others_tells_for_whom_it_waits(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"WORLD_SIZE": "3", **MET}.items():
        environment.setenv(name, value)
    environment.setattr(launch, "_TELL_AFTER", 0.05)

    def wait(seconds: float) -> str:
        caplog.clear()
        strategy = SimpleNamespace(setup_environment=lambda: time.sleep(seconds))
        trainer: Any = SimpleNamespace(num_devices=3, num_nodes=1, strategy=strategy)
        set_up_processes(trainer, {})
        return caplog.text

    assert "process 0 waits at 127.0.0.1:29500 for the other 2 of 3 processes: start them" in wait(0.5)
    assert wait(0) == ""


def test_block_parallel_does_not_synchronize_buffers() -> None:
    """All processes compute equal buffers; those of learned rounding are as large as the weights."""

    class Learned(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.learned = torch.nn.Parameter(torch.zeros(2))
            self.register_buffer("start", torch.zeros(2), persistent=False)

    strategy = BlockParallel()
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    strategy.model = Learned()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        strategy.configure_ddp()
        assert isinstance(strategy.model, DistributedDataParallel)
        assert len(strategy.model.modules_buffers) == 1
        assert not strategy.model.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


def test_launch_arguments_other_strategy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "strategy" not in launch_arguments({"strategy": SingleDeviceStrategy("cpu")})
    with pytest.raises(UserError, match="trainer.strategy 'fsdp' is not supported, because omniq .*: remove it"):
        launch_arguments({"strategy": "fsdp"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for strategy in ("fsdp", SingleDeviceStrategy("cpu")):
        with pytest.raises(UserError, match="trainer.strategy .* is not supported, because omniq .*: remove it"):
            launch_arguments({"strategy": strategy})


def test_join_devices_other_than_launched_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneProcess:
        num_devices = num_nodes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"trainer.devices 1 means 1 process\(es\), but 2 were started"):
        set_up_processes(OneProcess(), {"devices": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "nodes", "asked", "start"),
    [
        (2, 1, "trainer.devices 2 means 2", "torchrun --nproc-per-node 2 -m"),
        (1, 2, "trainer.num_nodes 2 means 2", "torchrun --nnodes 2 --nproc-per-node 1 -m"),
        (4, 2, "trainer.num_nodes 2 of 4 devices means 8", "torchrun --nnodes 2 --nproc-per-node 4 -m"),
    ],
)
def test_join_processes_not_started_are_refused_with_command(
    monkeypatch: pytest.MonkeyPatch, devices: int, nodes: int, asked: str, start: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    trainer: Any = SimpleNamespace(num_devices=devices, num_nodes=nodes)
    with pytest.raises(UserError) as caught:
        set_up_processes(trainer, {"devices": devices, "num_nodes": nodes})
    assert str(caught.value).startswith(f"{asked} process(es), but one was started: run {start} ")


@pytest.mark.parametrize(
    ("samples", "held_out", "message"),
    [
        (2, 0, "data.samples 2 is not divisible by the 4 processes: give 4"),
        (9, 4, "data.samples 9 .* 4 processes: give 8"),
        (8, 2, "data.held_out 2 is not divisible by the 4 processes"),
    ],
)
def test_check_shares_uneven_shares_are_refused(
    monkeypatch: pytest.MonkeyPatch, samples: int, held_out: int, message: str
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    check_divisible(8, 0)
    with pytest.raises(UserError, match=message):
        check_divisible(samples, held_out)
