# SPDX-License-Identifier: Apache-2.0
r"""Perplexity of a causal language model over windows of tokens.

For ``m`` windows ``x`` of ``t`` tokens each, every window independent (without context from the previous window),

    PPL = exp( 1 / (m (t - 1)) * sum_w sum_{i=1}^{t-1} -log p(x[w, i] | x[w, :i]) ).

This is the protocol of GPTQ and OmniQuant (arXiv 2308.13137): the mean over the ``t - 1`` targets of each window, then
the mean of the ``m`` means. All windows have the same length, so the two averages equal the average over all targets.
The published code multiplies by ``t`` and divides by ``m * t``, which cancels, and still divides by all ``m`` windows
if it evaluates fewer. Here, only evaluated windows count.

Numerics: logits have the dtype of the model and are converted to float32 a few rows at a time, so that no second copy
of the vocabulary is in memory. Exponentials are in float32, sums over tokens in float64. The metric of torchmetrics
computes the softmax in the dtype of the logits and then the logarithm; in bfloat16 its error is 2.7 %, and its result
is infinite for a target far below the maximum.

``evaluate_model`` runs a model that fits in memory. ``evaluate_streamed`` reads a checkpoint block by block, once, and
measures several variants of it side by side (full precision, rounded to nearest, learned).

Shapes: ``m`` windows, ``b`` windows in a batch, ``t`` tokens per window, ``h`` hidden size, ``v`` vocabulary.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from omniq.blocks.placement import ActivationPlacement
from omniq.errors import UserError
from omniq.evaluate.result import PerplexityResult
from omniq.evaluate.streaming import Variant, stream_logits
from omniq.models.source import SourceModel

CHUNK = 2**24
"""Number of logits to convert to float32 at once: 64 MiB, and the same for their exponentials."""


class Perplexity(Metric):
    """Perplexity as a metric: exact sums, mergeable over batches and processes.

    ``update`` takes the logits of whole windows and shifts them itself. The two sums stay float64 and int64 when the
    module that holds the metric is cast to another dtype.

    Args:
        chunk: number of logits to convert to float32 at once.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    nll: Tensor
    tokens: Tensor

    def __init__(self, chunk: int = CHUNK, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk = chunk
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, tokens: Tensor) -> None:
        """Add a batch of windows.

        Args:
            logits: ``[b, t, v]``; position ``i`` predicts token ``i + 1``.
            tokens: ``[b, t]`` int64.
        """
        rows = max(1, self.chunk // logits.shape[-1])
        for window, target in zip(logits[:, :-1], tokens[:, 1:], strict=True):  # [t - 1, v], [t - 1]
            for part, wanted in zip(window.split(rows), target.split(rows), strict=True):
                self.nll += token_losses(part.float(), wanted.to(part.device)).sum().to(self.nll.device)
        self.tokens += tokens[:, 1:].numel()

    @override
    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar."""
        return torch.exp(self.nll / self.tokens)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # ``parent.to(torch.bfloat16)`` calls this and would cast the sum: move it to the device only.
        nll = self.nll
        super()._apply(fn, exclude_state)
        self.nll = nll.to(self.nll.device)
        self._defaults["nll"] = torch.zeros_like(self.nll)
        self._computed = None
        return self


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float64 ``[n]``.

    ``log(sum_j exp(l_j - max)) + max - l_target``, with pairwise summation over the vocabulary, as in ``torch.sum``.
    ``torch.nn.functional.cross_entropy`` sums sequentially on a CPU: with 151,936 logits, its losses are 5e-6 too low
    on average, while these are within 3e-8.

    Args:
        logits: ``[n, v]`` float32.
        targets: ``[n]`` int64.
    """
    top = logits.amax(-1, keepdim=True)
    mass = (logits - top).exp_().sum(-1)
    return mass.double().log() + (top - logits.gather(-1, targets[:, None])).squeeze(-1).double()


def evaluate_model(
    model: nn.Module, windows: Tensor, batch_size: int = 1, device: torch.device | str | None = None
) -> PerplexityResult:
    """Measure the perplexity of a causal language model of transformers.

    Args:
        model: called as ``model(input_ids=…).logits``.
        windows: int64 ``[m, t]``.
        batch_size: windows per forward.
        device: device for model and tokens; by default the device of the model.

    Raises:
        UserError: the windows are longer than the model's context, or contain tokens outside its vocabulary.
    """
    _check(windows, model.config)
    started, training = time.perf_counter(), model.training
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    metric = Perplexity(sync_on_compute=False).to(device)
    model.eval()
    try:
        with torch.no_grad():
            for batch in windows.split(batch_size):
                tokens = batch.to(device)
                metric.update(model(input_ids=tokens, use_cache=False, return_dict=True).logits, tokens)
    finally:
        model.train(training)
    return _result(metric, windows, started)


def evaluate_streamed(
    source: SourceModel,
    windows: Tensor,
    variants: Mapping[str, Variant],
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    dtype: torch.dtype | None = None,
    placement: Callable[[int], ActivationPlacement] | None = None,
) -> dict[str, PerplexityResult]:
    """Measure several variants of a checkpoint in one pass over its blocks.

    Args:
        source, windows, variants, device, batch_size, dtype, placement: as for
            ``omniq.evaluate.streaming.stream_logits``.
        progress: called with the numbers of finished and of all steps; each block is one step, and so is the head.

    Raises:
        UserError: the windows are longer than the model's context, or contain tokens outside its vocabulary.
    """
    started, blocks = time.perf_counter(), source.num_blocks
    metrics = {name: Perplexity(sync_on_compute=False).to(device) for name in variants}

    def report(done: int) -> None:
        if progress is not None:
            progress(done, blocks + 1)

    for name, logits, tokens in stream_logits(source, windows, variants, device, batch_size, report, dtype, placement):
        metrics[name].update(logits, tokens)
    results = {name: _result(metric, windows, started) for name, metric in metrics.items()}
    report(blocks + 1)
    return results


def _check(windows: Tensor, config: Any) -> None:
    """Refuse windows that the model does not support; on a GPU, only an assertion would fail, without a reason."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise UserError(
            f"evaluation.length {windows.shape[1]} exceeds the model's context of {positions} tokens: give {positions} "
            "or less"
        )
    largest = int(windows.max())
    if largest >= text.vocab_size:
        raise UserError(
            f"evaluation: token {largest} is outside the model's vocabulary of {text.vocab_size} tokens: use the "
            "tokenizer of this model"
        )


def _result(metric: Perplexity, windows: Tensor, started: float) -> PerplexityResult:
    return PerplexityResult(
        perplexity=metric.compute().item(),
        nll=(metric.nll / metric.tokens).item(),
        tokens=int(metric.tokens),
        windows=len(windows),
        seconds=time.perf_counter() - started,
    )
