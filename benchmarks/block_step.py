# SPDX-License-Identifier: Apache-2.0
"""One calibration step of a LLaMA-shaped block: omniq's against plain eager autograd of the same algorithm.

    python benchmarks/block_step.py                          # CUDA: LLaMA-7B shapes, samples of 2048 tokens, float16
    python benchmarks/block_step.py --shape 70b --json step.json
    python benchmarks/block_step.py --device cpu             # a SmolLM2-135M block, float32, 256 tokens

A step is forward, loss, backward and AdamW on one sample. Figures of a scheme:

    step ms     the step as a run makes it (CUDA graph, fused fake-quant, SDPA), median
    fit ms      the same inside Lightning's Trainer.fit, per step, with losses tracked
    eager ms    differentiable torch throughout (``fake_quantize_reference``), materialised attention, every loss read
    floor ms    arithmetic (linears forward, dW, dX; causal attention) over the matrix rate measured in the same run
    GiB         peak memory of the step beside the block, omniq and eager
    agreement   largest relative difference of the two losses over 50 steps from the same start
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaModel

from omniq.callbacks import BlockLosses
from omniq.cli import quiet
from omniq.kernels.fake_quant import fake_quantize_reference
from omniq.models.llama import LLAMA
from omniq.quantizers.grid import Grid, parse_scheme
from omniq.stages.base import BlockTask
from omniq.stages.omniquant import OmniQuant, OmniQuantModule
from omniq.stages.step import OptimizerStep

SHAPES = {
    "smollm2": (576, 1536, 9, 3),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "70b": (8192, 28672, 64, 8),
}
SCHEMES = {"cuda": ("W4A16", "W3A16g128", "W2A16g128"), "cpu": ("W4A16", "W3A16g64")}


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
    bits, _, _, group_size = parse_scheme(scheme)

    def precision() -> Any:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    task = BlockTask(0, LLAMA, model.layers[0], Grid(bits, group_size), inputs, inputs, kwargs, precision=precision)
    task.targets = task.run(inputs)
    return task


class Eager:
    """The same algorithm, written plainly."""

    def __init__(self, task: BlockTask) -> None:
        self.module = OmniQuantModule(task, OmniQuant(epochs=1))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=0.0, foreach=False)
        self.scaler = torch.amp.GradScaler(enabled=task.inputs.dtype == torch.float16)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward with reference fake quantization and eager attention."""
        task, weights = self.module.task, {}
        for name in task.family.linears:
            clip = self.module.clip(name)
            weight = task.linear(name).weight.float()  # a float32 copy of every weight, as in the published code
            weights[f"{name}.weight"] = fake_quantize_reference(
                weight, clip.lo, clip.hi, clip.upper, clip.lower, clip.grid, inputs.dtype
            )
        config = task.block.self_attn.config
        before, config._attn_implementation = config._attn_implementation, "eager"
        tokens = inputs.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(inputs.dtype).min, device=inputs.device).triu(1)[None, None]
        kwargs = {**task.kwargs, "attention_mask": mask.to(inputs.dtype)}
        output = functional_call(task.block, weights, (inputs,), kwargs)
        config._attn_implementation = before
        return nn.functional.mse_loss(output.float(), targets.float())

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update; the loss is read back, as the published code does."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


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


def floor_ms(shape: str, tokens: int, rate: float) -> float:
    """Least arithmetic of a step: forward, dW of all linears, dX of those behind learned ones, causal attention."""
    hidden, inner, heads, kv_heads = SHAPES[shape]
    kv = hidden // heads * kv_heads
    attention_in = hidden * (hidden + 2 * kv)
    rest = hidden * hidden + 3 * hidden * inner
    linears = 2 * tokens * (2 * (attention_in + rest) + rest)
    attention = 3 * 2 * tokens * tokens * hidden  # QK and PV, causal, once forward and twice backward
    return 1e3 * (linears + attention) / rate


def build_step(task: BlockTask, graph: bool) -> tuple[OmniQuantModule, OptimizerStep]:
    """omniq's step outside Lightning."""
    module = OmniQuantModule(task, OmniQuant(epochs=1))
    module.to(task.device)
    scaler = torch.amp.GradScaler() if task.inputs.dtype == torch.float16 else None
    return module, OptimizerStep(module.loss, module.configure_optimizers(), scaler, graph)


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
    module = OmniQuantModule(task, OmniQuant(epochs=epochs))
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


def compare(task: BlockTask, device: str, repeats: int) -> dict[str, Any]:
    """omniq's step beside the eager one: agreement, peak memory, time; neither outlives the call."""
    batches = [(task.inputs[i : i + 1], task.targets[i : i + 1]) for i in range(len(task.inputs))]
    with task.precision():
        _, step = build_step(task, graph=True)
        eager = Eager(task)
        ours = [float(step(*batches[i % 8])) for i in range(50)]
        theirs = [eager.step(*batches[i % 8]) for i in range(50)]
        _, fresh = build_step(task, graph=True)
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
    task = make_task(shape, scheme, device, tokens, 8, dtype)
    row = {"shape": shape, "scheme": scheme, **compare(task, device, repeats)}
    with TemporaryDirectory() as folder:
        row["fit_ms"] = fit_ms(task, 96 if device == "cuda" else 16, Path(folder))
    row["forward_ms"] = timed(lambda: task.run(task.inputs), device, 5) / len(task.inputs)
    row["floor_ms"] = floor_ms(shape, tokens, rate)
    return row | {"speedup": row["eager_ms"] / row["step_ms"], "over_floor": row["step_ms"] / row["floor_ms"]}


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
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    device = arguments.device
    shape = arguments.shape or ("7b" if device == "cuda" else "smollm2")
    tokens = arguments.tokens or (2048 if device == "cuda" else 256)
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    rate = matrix_rate(device, dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}, {rate / 1e12:.2f} TFLOP/s, {tokens} tokens a sample")
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
