# SPDX-License-Identifier: Apache-2.0
"""Exchange of values between processes, over gloo."""

import subprocess
import sys
from pathlib import Path

import torch

from omniq.distributed import collectives

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_collectives_of_one_process_need_no_group() -> None:
    tensor = torch.arange(3.0)
    assert collectives.all_reduce_sum(tensor) is tensor
    assert collectives.all_reduce_max(tensor) is tensor
    assert collectives.all_gather_samples(tensor) is tensor
    assert collectives.local_shard(tensor).equal(tensor)
    assert (collectives.rank(), collectives.world_size(), collectives.broadcast_from_rank0(lambda: 7)) == (0, 1, 7)
    assert not collectives.all_ranks(False)
    done: list[int] = []
    collectives.finish_on_rank0(lambda: done.append(1))
    assert done == [1]


COLLECTIVES = """
import sys
import time
from pathlib import Path
import torch
import torch.distributed as dist
from omniq.distributed import collectives
from omniq.errors import UserError
from omniq.blocks.streams import Streams

dist.init_process_group("gloo")
rank, whole = collectives.rank(), torch.arange(20.0).view(10, 2)
assert collectives.world_size() == 2
share = collectives.local_shard(whole)
assert share.equal(whole[rank::2])
assert collectives.all_gather_samples(share).equal(whole)
assert all(collectives.all_gather_rows(whole[:n][collectives.local_rows(n)], n).equal(whole[:n]) for n in (0, 1, 9, 10))
assert collectives.all_reduce_sum(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
assert collectives.all_reduce_max(torch.tensor([1.0, rank])).tolist() == [1.0, 1.0]
assert collectives.all_ranks(True) and not collectives.all_ranks(rank == 0)
assert collectives.broadcast_from_rank0(lambda: {"rank": rank}) == {"rank": 0}
snapshot = Streams(3, share, share + 1).snapshot()
assert (snapshot is None) == (rank == 1)
if snapshot is not None:
    assert snapshot.index == 3
    assert snapshot.full_precision.equal(whole) and snapshot.quantized.equal(whole + 1)

def mistake():
    raise UserError("told by the first")

try:
    collectives.broadcast_from_rank0(mistake)
except collectives.ErrorOnRank0:
    assert rank == 1
except UserError as error:
    assert rank == 0 and str(error) == "told by the first"

file = Path(sys.argv[1])
def slowly():
    assert rank == 0 and collectives.world_size() == 1
    time.sleep(1)
    file.write_text("done")

collectives.finish_on_rank0(slowly)
assert file.exists() and collectives.world_size() == 1
print(f"process {rank} is done")
"""


def test_collectives_of_two_processes_exchange_values(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    command = [*TORCHRUN, str(script), str(tmp_path / "written")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "process 0 is done" in done.stdout
    assert "process 1 is done" in done.stdout
