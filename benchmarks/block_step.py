# SPDX-License-Identifier: Apache-2.0
"""One calibration step of a LLaMA-shaped block: omniq's against plain eager autograd of the same algorithm.

    python benchmarks/block_step.py                          # CUDA: LLaMA-7B shapes, samples of 2048 tokens, float16
    python benchmarks/block_step.py --shape 70b --json step.json
    python benchmarks/block_step.py --schemes W4A4KV4 --profile      # which kernels the time goes to
    python benchmarks/block_step.py --device cpu             # a SmolLM2-135M block, float32, 256 tokens

A step is forward, loss, backward and AdamW on one sample: of learned clipping, and where a scheme has activation bits,
of clipping and transform, with queries quantized too wherever keys and values are. Figures of a scheme:

    step ms     the step as a run makes it (CUDA graph, fused fake-quant, SDPA), median
    fit ms      the same inside Lightning's Trainer.fit, per step, with losses tracked
    eager ms    differentiable torch throughout, materialised attention, every loss read (``benchmarks/plain/step.py``)
    floor ms    arithmetic (linears forward, dW, dX; causal attention) over the matrix rate measured in the same run
    GiB         peak memory of the step beside the block, omniq and eager
    agreement   largest relative difference of the two losses over 50 steps from the same start
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from plain.step import Eager
from transformers import LlamaConfig, LlamaModel

from omniq.callbacks import BlockLosses
from omniq.cli import quiet
from omniq.models.llama import LLAMA
from omniq.quantizers.grid import parse_scheme
from omniq.quantizers.scheme import Scheme
from omniq.stages.base import BlockTask
from omniq.stages.omniquant import OmniQuant, OmniQuantModule
from omniq.stages.step import OptimizerStep
from omniq.transforms.let import LET

SHAPES = {
    "smollm2": (576, 1536, 9, 3),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "70b": (8192, 28672, 64, 8),
}
SCHEMES = {"cuda": ("W4A16", "W3A16g128", "W2A16g128", "W4A4KV4", "W6A6KV6"), "cpu": ("W4A16", "W3A16g64", "W4A4KV4")}
# What kernels are about, by a part of their name; the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "cudnn", "sdpa", "attention"),
    "products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "cublas", "splitK"),
    "weights": ("fake_quant", "moving_"),
    "activations": ("tokens_",),
    "optimizer": ("multi_tensor", "FusedAdam", "amp_"),
    "others": ("",),
}


def make_task(shape: str, scheme: str, device: str, tokens: int, samples: int, dtype: torch.dtype) -> BlockTask:
    """A random block of the given shape with random streams."""
    torch.manual_seed(0)
    hidden, inner, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).to(device, dtype).eval().requires_grad_(False)
    inputs = torch.randn(samples, tokens, hidden, device=device).to(dtype)
    cos, sin = model.rotary_emb(inputs[:1], torch.arange(tokens, device=device)[None])
    kwargs = {"attention_mask": None, "position_embeddings": (cos, sin)}
    _, activation_bits, kv_bits, _ = parse_scheme(scheme)
    whole = Scheme(scheme, queries=activation_bits < 16 and kv_bits < 16)

    def precision() -> Any:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    block, activations = model.layers[0], whole.activations
    task = BlockTask(0, LLAMA, block, whole.grid, inputs, inputs, kwargs, precision=precision, activations=activations)
    task.targets = task.run(inputs)
    return task


def timed(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median milliseconds of a call, warmed up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (timed(lambda: a @ b, device, 10) / 1e3)


def floor_ms(shape: str, tokens: int, rate: float, transform: bool) -> float:
    """Least arithmetic of a step: forward, dW of all linears, dX of those behind what is learned, causal attention.

    A transform learns the norm that the first linears read.
    """
    hidden, inner, heads, kv_heads = SHAPES[shape]
    kv = hidden // heads * kv_heads
    attention_in = hidden * (hidden + 2 * kv)
    rest = hidden * hidden + 3 * hidden * inner
    linears = 2 * tokens * (2 * (attention_in + rest) + rest + (attention_in if transform else 0))
    attention = 3 * 2 * tokens * tokens * hidden  # QK and PV, causal, once forward and twice backward
    return 1e3 * (linears + attention) / rate


def settings_of(task: BlockTask, epochs: int = 1) -> OmniQuant:
    """Learned clipping; with quantized activations a transform too."""
    return OmniQuant(epochs=epochs, transform=LET() if task.activations.quantized else None)


def build_step(task: BlockTask) -> OptimizerStep:
    """omniq's step outside Lightning."""
    module = OmniQuantModule(task, settings_of(task)).to(task.device)
    scaler = torch.amp.GradScaler() if task.inputs.dtype == torch.float16 else None
    return OptimizerStep(module.loss, module.configure_optimizers(), scaler)


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


def peak_gib(run: Callable[[], Any], device: str) -> float | None:
    """Peak GPU memory of a call beside what is allocated before it."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def batches_of(task: BlockTask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Its samples, one by one."""
    return [(task.inputs[i : i + 1], task.targets[i : i + 1]) for i in range(len(task.inputs))]


def compare(make: Callable[[], BlockTask], device: str, repeats: int) -> dict[str, Any]:
    """omniq's step beside the eager one: agreement, peak memory, time; neither outlives the call."""
    task, plain = make(), make()  # a transform's start is fused into the block
    batches = batches_of(task)
    with task.precision():
        step, eager = build_step(task), Eager(plain, settings_of(plain))
        ours = [float(step(*batches[i % 8])) for i in range(50)]
        theirs = [eager.step(*batches[i % 8]) for i in range(50)]
        fresh = build_step(make())
        return {
            "agreement": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
            "gib": peak_gib(lambda: [fresh(*batches[i % 8]) for i in range(6)], device),
            "eager_gib": peak_gib(lambda: eager.step(*batches[0]), device),
            "step_ms": timed(lambda: step(*batches[0]), device, repeats),
            "eager_ms": timed(lambda: eager.step(*batches[0]), device, max(5, repeats // 4)),
        }


def measure(
    shape: str, scheme: str, device: str, tokens: int, dtype: torch.dtype, repeats: int, rate: float
) -> dict[str, Any]:
    """One line of the table."""
    make = partial(make_task, shape, scheme, device, tokens, 8, dtype)
    row = {"shape": shape, "scheme": scheme, **compare(make, device, repeats)}
    task = make()
    with TemporaryDirectory() as folder:
        row["fit_ms"] = fit_ms(task, 96 if device == "cuda" else 16, Path(folder))
    row["forward_ms"] = timed(lambda: task.run(task.inputs), device, 5) / len(task.inputs)
    row["floor_ms"] = floor_ms(shape, tokens, rate, task.activations.quantized)
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
                step(*batches[i % 8])
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
    return f"{text:>10}"


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES))
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes instead")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.profile and device != "cuda":
        parser.error("--profile times kernels of a GPU: leave it out here")
    shape = arguments.shape or ("7b" if device == "cuda" else "smollm2")
    tokens = arguments.tokens or (2048 if device == "cuda" else 256)
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    rate = matrix_rate(device, dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}, {rate / 1e12:.2f} TFLOP/s, {tokens} tokens a sample")
    if arguments.profile:
        for scheme in arguments.schemes or SCHEMES[device]:
            print(f"\n{shape} {scheme}")
            print_kernels(make_task(shape, scheme, device, tokens, 8, dtype))
        return
    columns = ["shape", "scheme", "step_ms", "fit_ms", "eager_ms", "floor_ms", "speedup", "over_floor", "forward_ms"]
    columns += ["gib", "eager_gib", "agreement"]
    print(" ".join(cell(column) for column in columns))
    rows = []
    for scheme in arguments.schemes or SCHEMES[device]:
        row = measure(shape, scheme, device, tokens, dtype, 30 if device == "cuda" else 5, rate)
        rows.append(row)
        print(" ".join(cell(row[column]) for column in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
