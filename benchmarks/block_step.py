# SPDX-License-Identifier: Apache-2.0
"""One calibration step of a LLaMA-shaped block: omniq's against plain eager autograd of the same algorithm.

    python benchmarks/block_step.py                          # CUDA: LLaMA-7B shapes, samples of 2048 tokens, float16
    python benchmarks/block_step.py --shape 70b --json step.json
    python benchmarks/block_step.py --schemes W4A16 --compile        # what torch.compile would make of the step
    python benchmarks/block_step.py --schemes W4A4KV4 --profile      # which kernels the time goes to
    python benchmarks/block_step.py --device cpu             # a SmolLM2-135M block, float32, 256 tokens

A step is forward, loss, backward and AdamW on one sample: of learned clipping, and where a scheme has activation bits,
of clipping and transform, with queries quantized too wherever keys and values are. Figures of a scheme:

    step ms     the step as a run makes it (CUDA graph, fused fake-quant, SDPA), median
    fit ms      the same inside Lightning's Trainer.fit, per step, with losses tracked
    calls ms    the same without the graph, kernels launched one by one (on a CPU a step is that anyway)
    eager ms    differentiable torch throughout, materialised attention, every loss read (``benchmarks/plain/step.py``)
    floor ms    the larger of arithmetic over matrix rate and bytes over copy bandwidth, both measured in the same run
                (``benchmarks/measuring/llama.py`` counts them)
    speedup     eager over step
    forward ms  a sample through the full-precision block, eight at a time
    gib         peak memory of the step beside the block, omniq and eager (``benchmarks/measuring/machine.py``)
    agreement   largest relative difference of the two losses over 200 steps from the same start; ``at the end``: of
                their means over the last pass. Where a weight or activation turns over to the next code by the order
                of a sum, single losses differ by what a code is worth

and with ``--compile``, which takes a minute for each, beside ``step ms`` and ``calls ms``:

    compiled ms  the whole step by torch.compile (it breaks at the backward and goes on after it), no graph of ours
    both ms      loss and gradient by torch.compile, all of it in our graph: what a run does if it is told to compile
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from measuring.llama import SHAPES, forward_work, make_task, step_work
from measuring.machine import Rates, name_of, peak_bytes, seconds_of, write_json
from plain.step import Eager

from omniq.blocks.activation_hooks import attach
from omniq.calibration.captured_step import OptimizerStep
from omniq.calibration.task import BlockTask
from omniq.callbacks.losses import BlockLosses
from omniq.cli.quiet import quiet
from omniq.grid.name import parse_scheme
from omniq.grid.scheme import Activations, Scheme
from omniq.stages.modules.omniquant import OmniQuantModule
from omniq.stages.omniquant import OmniQuant
from omniq.transforms.let import LET

SCHEMES = {"cuda": ("W4A16", "W3A16g128", "W2A16g128", "W4A4KV4", "W6A6KV6"), "cpu": ("W4A16", "W3A16g64", "W4A4KV4")}
SAMPLES = 8
GIB = 2**30
# What kernels are about, by a part of their name; the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "cudnn", "sdpa", "attention"),
    "products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "cublas", "splitK"),
    "weights": ("group_forward", "group_backward", "row_forward", "row_backward"),
    "activations": ("tokens_",),
    "optimizer": ("multi_tensor", "FusedAdam", "amp_"),
    "others": ("",),
}


def scheme_of(name: str) -> Scheme:
    """With queries quantized wherever keys and values are."""
    _, activation_bits, kv_bits, _ = parse_scheme(name)
    return Scheme(name, queries=activation_bits < 16 and kv_bits < 16)


def settings_of(task: BlockTask, epochs: int = 1) -> OmniQuant:
    """Learned clipping; with quantized activations a transform too."""
    return OmniQuant(epochs=epochs, transform=LET() if task.activations.quantized else None)


def build_step(task: BlockTask, graph: bool = True) -> OptimizerStep:
    """omniq's step outside Lightning."""
    module = OmniQuantModule(task, settings_of(task)).to(task.device)
    scaler = torch.amp.GradScaler() if task.inputs.dtype == torch.float16 else None
    return OptimizerStep(module.criterion, module.configure_optimizers(), scaler, graph)


def compiled_loss(task: BlockTask) -> OptimizerStep:
    """The step of a run that is told to compile: loss and gradient by torch.compile, in our graph."""
    torch._dynamo.reset()
    task.compile = True
    return build_step(task)


def compiled_step(task: BlockTask) -> Callable[..., torch.Tensor]:
    """The whole step by torch.compile, without our graph.

    What quantizes activations is attached once, outside: attaching hooks would break the graph of the forward.
    """
    torch._dynamo.reset()
    step = build_step(task, graph=False)
    attach(task.block, task.layout, task.activations)
    task.activations = Activations()
    return torch.compile(step.__call__)


def fit_ms(task: BlockTask, steps: int, folder: Path) -> float:
    """Milliseconds a step inside Trainer.fit, second half of the steps."""
    marks: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx in (steps // 2 - 1, steps - 1):
                if task.device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

    epochs = max(1, steps // len(task.inputs))
    module = OmniQuantModule(task, settings_of(task, epochs))
    half = {torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed"}.get(task.inputs.dtype, "32-true")
    trainer = L.Trainer(
        accelerator="gpu" if task.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        precision=half,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BlockLosses(folder / "steps.csv", "OmniQuant"), Clock()],
    )
    trainer.fit(module, module.batches)
    return 1e3 * (marks[1] - marks[0]) / (steps - steps // 2)


def batches_of(task: BlockTask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Its samples, one by one."""
    return [(task.inputs[i : i + 1], task.targets[i : i + 1]) for i in range(len(task.inputs))]


def compare(make: Callable[[], BlockTask], device: str, repeats: int, steps: int, rates: Rates) -> dict[str, Any]:
    """omniq's step beside the eager one: agreement, peak memory, time, floor; neither outlives the call."""
    task, plain = make(), make()  # a transform's start is fused into the block
    batches = batches_of(task)
    with task.precision():
        step, eager = build_step(task), Eager(plain, settings_of(plain))
        ours = [float(step(*batches[i % SAMPLES])) for i in range(steps)]
        theirs = [eager.step(*batches[i % SAMPLES]) for i in range(steps)]
        fresh = build_step(make())
        few = 6 if device == "cuda" else 2  # beyond the capture
        work = step_work(plain, eager.module)
        return {
            "agreement": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
            "at_the_end": abs(sum(ours[-SAMPLES:]) / sum(theirs[-SAMPLES:]) - 1),
            "gib": peak_bytes(lambda: [fresh(*batches[i]) for i in range(few)], device) / GIB,
            "eager_gib": peak_bytes(lambda: eager.step(*batches[0]), device) / GIB,
            "step_ms": 1e3 * seconds_of(lambda: step(*batches[0]), device, repeats),
            "eager_ms": 1e3 * seconds_of(lambda: eager.step(*batches[0]), device, max(5, repeats // 4)),
            "floor_ms": 1e3 * rates.floor(work),
            "operations": work.operations,
            "bytes": work.moved,
        }


def alternatives(make: Callable[[], BlockTask], device: str, repeats: int, compile: bool) -> dict[str, Any]:
    """Milliseconds of the step made otherwise, so that how a run makes it is a choice by measurement."""
    row: dict[str, Any] = {}
    for name, wanted, build in (
        ("calls_ms", device == "cuda", partial(build_step, graph=False)),
        ("compiled_ms", compile, compiled_step),
        ("both_ms", compile and device == "cuda", compiled_loss),
    ):
        task = make()
        batches = batches_of(task)
        with task.precision():
            step = build(task) if wanted else None
            row[name] = None if step is None else 1e3 * seconds_of(partial(step, *batches[0]), device, repeats, 6)
    return row


def measure(make: Callable[[], BlockTask], device: str, arguments: argparse.Namespace, rates: Rates) -> dict[str, Any]:
    """One line of the table."""
    repeats = 30 if device == "cuda" else 5
    row = compare(make, device, repeats, arguments.steps, rates)
    row |= alternatives(make, device, repeats, arguments.compile)
    task = make()
    with TemporaryDirectory() as folder:
        row["fit_ms"] = fit_ms(task, 96 if device == "cuda" else 16, Path(folder))
    row["forward_ms"] = 1e3 * seconds_of(lambda: task.run(task.inputs), device, 5) / SAMPLES
    row["forward_floor_ms"] = 1e3 * rates.floor(forward_work(task, SAMPLES)) / SAMPLES
    return row | {"speedup": row["eager_ms"] / row["step_ms"], "over_floor": row["step_ms"] / row["floor_ms"]}


def print_kernels(task: BlockTask, steps: int = 10, longest: int = 25) -> None:
    """Which kernels a step spends the GPU's time on, by kind and by name; milliseconds and launches a step."""
    batches = batches_of(task)
    with task.precision():
        step = build_step(task)
        for _ in range(6):  # beyond the capture
            step(*batches[0])
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for i in range(steps):
                step(*batches[i % SAMPLES])
            torch.cuda.synchronize()
    each_step = ((kernel.self_device_time_total / 1e3, kernel.count, kernel.key) for kernel in profile.key_averages())
    found = sorted(((ms / steps, count / steps, name) for ms, count, name in each_step if ms > 0), reverse=True)
    kinds = dict.fromkeys(KINDS, (0.0, 0.0))
    for ms, count, name in found:
        kind = next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        kinds[kind] = (kinds[kind][0] + ms, kinds[kind][1] + count)
    kinds["all"] = (sum(ms for ms, _, _ in found), sum(count for _, count, _ in found))
    for name, (ms, count) in kinds.items():
        print(f"{ms:8.3f} ms {count:6.1f} x  {name}")
    print()
    for ms, count, name in found[:longest]:
        print(f"{ms:8.3f} ms {count:6.1f} x  {name[:160]}")


def cell(value: Any) -> str:
    """A column of the table."""
    text = "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
    return f"{text:>11}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """The last row, below the names if it is the first."""
    names = ["shape", "scheme", "step_ms", "fit_ms", "calls_ms", "eager_ms", "floor_ms", "speedup", "over_floor"]
    names += ["forward_ms", "gib", "eager_gib", "agreement", "at_the_end", "compiled_ms", "both_ms"]
    if len(rows) == 1:
        print(" ".join(cell(name) for name in names))
    print(" ".join(cell(rows[-1][name]) for name in names), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES))
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=200, help="over which losses are compared")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of the step, too")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes instead")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    if arguments.profile and arguments.device != "cuda":
        parser.error("--profile times kernels of a GPU: leave it out here")
    return arguments


def main() -> None:
    quiet()
    arguments = parse()
    device = arguments.device
    shape = arguments.shape or ("7b" if device == "cuda" else "smollm2")
    tokens = arguments.tokens or (2048 if device == "cuda" else 256)
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    rates = Rates.measure(device, dtype)
    print(f"{name_of(device)}, torch {torch.__version__}, {dtype}, {rates}, {tokens} tokens a sample")
    rows: list[dict[str, Any]] = []
    for scheme in arguments.schemes or SCHEMES[device]:
        make = partial(make_task, shape, scheme_of(scheme), device, tokens, SAMPLES, dtype)
        if arguments.profile:
            print(f"\n{shape} {scheme}")
            print_kernels(make())
            continue
        rows.append({"shape": shape, "scheme": scheme, **measure(make, device, arguments, rates)})
        print_table(rows)
    settings = {"dtype": str(dtype), "tokens": tokens, "steps": arguments.steps, "rates": vars(rates)}
    write_json(arguments.json, device, settings | {"rows": rows})


if __name__ == "__main__":
    main()
