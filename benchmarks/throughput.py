# SPDX-License-Identifier: Apache-2.0
"""A whole run over a random-weight checkpoint: time per block, where it goes, and how much memory it takes.

    python benchmarks/throughput.py                              # CUDA: 4 blocks of LLaMA-7B, 16 samples of 2048 tokens
    python benchmarks/throughput.py --blocks 32 --streams host   # the whole model, streams in pinned memory
    torchrun --nproc-per-node 2 benchmarks/throughput.py --folder bench   # several processes (a shared folder)

The checkpoint is written first (every block has the same weights; that takes no part in the figures). Then the run is
an ordinary one, learned clipping without evaluation and export, with a clock around its parts. Where a part ends, the
clock waits for the GPU, so that its time is its own; what goes on in the background costs only what is waited for:

    step        Trainer.fit: the steps, and Lightning around them
    statistics  what a stage gathers before its first step: importances, the initial search of the clipping
    finish      the last rounding
    propagate   both streams through the block
    deploy      what was found into the block's weights
    read        waiting for the next block
    write       block files, checkpoints of passes, snapshots of the streams
    summary     the loss of the deployed block
    other       everything else

After the run, on a random block of the same shape, come the floor of a block (its steps and the forwards of both
streams, each the larger of arithmetic over matrix rate and bytes over copy bandwidth, measured here; shared by the
processes), and the step in plain eager torch (``benchmarks/plain/step.py``), beside what one took here, in a fit.

Host memory: the largest anonymous part of the resident memory, sampled every 20 ms; files that are mapped (weights, and
streams on disk) are not in it, as the system may drop them. ``ru_maxrss`` has them and is printed beside it.
"""

import argparse
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from measuring.checkpoint import write_checkpoint
from measuring.llama import SHAPES, forward_work, make_task, step_work
from measuring.machine import Rates, name_of, seconds_of, write_json
from plain.step import Eager

from omniq.blocks.streams import Streams
from omniq.callbacks.checkpoint import AtomicCheckpointIO
from omniq.cli.quiet import quiet
from omniq.config.parse import parse_run
from omniq.grid.scheme import Scheme
from omniq.kernels.matmul_precision import matmul_precision
from omniq.run import loop
from omniq.stages.modules.omniquant import OmniQuantModule
from omniq.stages.omniquant import OmniQuant
from omniq.storage.run_dir import RunDir

DEFAULTS = {  # shape, blocks, samples, length, epochs, scheme, precision
    "cuda": ("7b", 4, 16, 2048, 2, "W3A16g128", "16-mixed"),
    "cpu": ("tiny", 4, 8, 128, 2, "W3A16g64", "32-true"),
}
Matmul = Literal["tf32", "ieee", "bf16"]
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}


class Clock:
    """Exclusive times of the parts of the main thread: while an inner part runs, the outer one stands still."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._parts = ["other"]
        self._since = time.perf_counter()
        self._thread = threading.get_ident()

    def now(self) -> float:
        """The time when the GPU is done with everything."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def restart(self) -> None:
        """Forget everything so far."""
        self.seconds, self._since = {}, self.now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """While this is entered, the time goes to this part."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._turn()
        self._parts.append(name)
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()

    def _turn(self) -> None:
        now = self.now()
        self.seconds[self._parts[-1]] = self.seconds.get(self._parts[-1], 0.0) + now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Put the clock around a function or method."""
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, name, timed)

    def watch_blocks(self) -> None:
        """The time that is waited for each block."""
        plain = loop.blocks_ahead

        def timed(*args: Any) -> Iterator[Any]:
            blocks = plain(*args)
            while True:
                with self.part("read"):
                    pair = next(blocks, None)
                if pair is None:
                    return
                yield pair
                del pair  # the caller has let go of the block; so must we

        loop.blocks_ahead = timed


class Memory(threading.Thread):
    """Samples the anonymous resident memory; nothing on systems without /proc."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.before = 0, self.anonymous()

    @staticmethod
    def anonymous() -> int:
        """Bytes now."""
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.anonymous())
            time.sleep(0.02)


def install(clock: Clock) -> None:
    """Put the clock around the parts of a run."""
    for owner, name, part in (
        (L.Trainer, "fit", "step"),
        (OmniQuant, "module", "statistics"),
        (OmniQuantModule, "finish", "finish"),
        (loop, "propagate", "propagate"),
        (loop, "load_quantized_weights", "deploy"),
        (loop, "summarize", "summary"),
        (RunDir, "save_block_async", "write"),
        (RunDir, "save_streams_async", "write"),
        (RunDir, "flush", "write"),
        (AtomicCheckpointIO, "save_checkpoint", "write"),
        (Streams, "snapshot", "write"),
    ):
        clock.watch(owner, name, part)
    clock.watch_blocks()
    settle, embed = RunDir.settle, loop._streams_before

    def wait(folder: RunDir) -> None:
        with clock.part("write") if folder._block is not None else nullcontext():  # every step asks, and only one waits
            settle(folder)

    RunDir.settle = wait

    def first(*args: Any) -> Streams:
        streams = embed(*args)
        clock.restart()  # what came before is opening and digesting the model, once a run
        return streams

    loop._streams_before = first


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; its figures."""
    device, source, text = arguments.device, folder / "source", folder / "text.txt"
    dtype = DTYPES[arguments.precision]
    if int(os.environ.get("RANK", 0)) == 0 and not (folder / "ready").exists():
        source.mkdir(parents=True, exist_ok=True)
        write_checkpoint(source, arguments.shape, arguments.blocks, arguments.length, dtype)
        text.write_text(" ".join(str(number) for number in range(arguments.samples * arguments.length)))
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        time.sleep(0.1)
    words = {"class_path": "omniq.data.LocalText", "init_args": {"path": str(text)}}
    trainer = {"accelerator": "gpu" if device == "cuda" else "cpu", "precision": arguments.precision, "logger": False}
    settings: dict[str, Any] = {
        "model": {"path": str(source)},
        "data": {"source": words, "samples": arguments.samples, "length": arguments.length, "held_out": 0},
        "scheme": {"name": arguments.scheme},
        "stages": [{"class_path": "omniq.stages.OmniQuant", "init_args": {"epochs": arguments.epochs}}],
        "trainer": trainer,
        "export": {"format": "none"},
        "streams": arguments.streams,
        "save_streams_every": arguments.save_streams_every,
        "out": str(folder / "run"),
    }
    run = parse_run(settings=settings)
    clock, memory = Clock(), Memory()
    install(clock)
    memory.start()
    started = time.perf_counter()
    loop.quantize(*run)
    with clock.part("end"):  # so that the last part is counted
        pass
    total = sum(clock.seconds.values())
    steps = arguments.blocks * arguments.epochs * arguments.samples
    figures = {
        "seconds": total,
        "seconds_per_block": total / arguments.blocks,
        "seconds_before_the_first_block": time.perf_counter() - started - total,
        "parts": dict(sorted(clock.seconds.items(), key=lambda item: -item[1])),
        "outside_the_step": 1 - clock.seconds["step"] / total,
        "ms_per_step": 1e3 * clock.seconds["step"] / steps,
        "host_bytes": memory.peak,
        "host_bytes_at_start": memory.before,
        "host_bytes_with_mapped_files": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "stream_bytes": 2 * arguments.samples * arguments.length * SHAPES[arguments.shape].hidden * dtype.itemsize,
    }
    return figures if int(os.environ.get("RANK", 0)) else figures | compare(arguments, figures, run[0].matmul)


def compare(arguments: argparse.Namespace, figures: dict[str, Any], matmul: Matmul) -> dict[str, Any]:
    """The floor of a block, and the step in plain torch, multiplying float32 as the run did."""
    device, samples, dtype = arguments.device, arguments.samples, DTYPES[arguments.precision]
    with matmul_precision("float32" if matmul == "ieee" else matmul, torch.device(device)):
        task = make_task(arguments.shape, Scheme(arguments.scheme), device, arguments.length, 1, dtype)
        rates = Rates.measure(device, dtype)
        with task.precision():
            eager = Eager(task, OmniQuant())
            eager_ms = 1e3 * seconds_of(lambda: eager.step(task.inputs, task.targets), device, 5)
    steps, processes = arguments.epochs * samples, int(os.environ.get("WORLD_SIZE", 1))
    floor = steps * rates.floor(step_work(task, eager.module)) + 2 * rates.floor(forward_work(task, samples))
    return {
        "rates": vars(rates),
        "floor_seconds_per_block": floor / processes,
        "over_floor": figures["seconds_per_block"] / (floor / processes),
        "eager_ms": eager_ms,
        "speedup": eager_ms / figures["ms_per_step"],
    }


def show(result: dict[str, Any], blocks: int) -> None:
    """The figures for people."""
    gib = 2**30
    print(f"{'part':12} {'s / block':>10} {'share':>7}")
    for name, seconds in result["parts"].items():
        print(f"{name:12} {seconds / blocks:10.3f} {seconds / result['seconds']:7.1%}")
    print(f"{'all':12} {result['seconds_per_block']:10.3f}   {result['ms_per_step']:.2f} ms a step of one sample")
    print(f"{'floor':12} {result['floor_seconds_per_block']:10.3f}   {result['over_floor']:.2f} times that")
    print(f"eager {result['eager_ms']:.2f} ms a step: {result['speedup']:.2f} times ours")
    before, mapped = result["host_bytes_at_start"] / gib, result["host_bytes_with_mapped_files"] / gib
    print(f"outside the step {result['outside_the_step']:.1%}; streams {result['stream_bytes'] / gib:.2f} GiB")
    print(f"host {result['host_bytes'] / gib:.2f} GiB ({before:.2f} before the run, {mapped:.2f} with mapped files)")
    if result["device_bytes"] is not None:
        print(f"GPU {result['device_bytes'] / gib:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    for name in ("blocks", "samples", "length", "epochs"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--scheme")
    parser.add_argument("--precision", choices=("32-true", "16-mixed", "bf16-mixed"))
    parser.add_argument("--streams", choices=("auto", "device", "host", "disk"), default="auto")
    parser.add_argument("--save_streams_every", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the checkpoint and the run; a temporary one if not given")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    names = ("shape", "blocks", "samples", "length", "epochs", "scheme", "precision")
    for name, value in zip(names, DEFAULTS[arguments.device], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, (arguments.folder or Path(temporary)).resolve())
    if int(os.environ.get("RANK", 0)) != 0:
        return
    chosen = {name: value for name, value in vars(arguments).items() if name not in ("json", "folder")}
    print(f"{name_of(arguments.device)}, torch {torch.__version__}, {chosen}")
    show(result, arguments.blocks)
    write_json(arguments.json, arguments.device, {"settings": chosen, **result})


if __name__ == "__main__":
    main()
