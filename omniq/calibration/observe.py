# SPDX-License-Identifier: Apache-2.0
"""What the inputs of a block's linears look like, gathered by one pass of the full-precision block.

Linears that share an input share its statistics: one hook on the first linear of each group. Everything accumulates
on the device, without host synchronisation: within a sample in float32, over samples in float64. There the sum of so
few numbers of like size is exact, so that it depends neither on their order nor on how processes share them.

The block may run in the Trainer's half precision, as it is deployed; what is made of its inputs never does (``exact``).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omniq.blocks.placement import gather_samples
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights, relative_weights
from omniq.distributed import collectives
from omniq.kernels.layer_problem import all_finite
from omniq.quantizers.clipping import Clipping

Observe = Callable[[str, Tensor], None]


@contextmanager
def observed(block: nn.Module, names: tuple[str, ...], observe: Observe) -> Iterator[None]:
    """While this is entered, ``observe(name, x)`` sees the input ``[tokens, i]`` of each named linear."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observe(name, args[0].detach().flatten(0, -2))

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exact(x: Tensor) -> AbstractContextManager[None]:
    """While this is entered, products on the device of ``x`` keep its dtype, whatever the Trainer's precision is.

    A training step and a stream's forward run in autocast, which would round a Gram matrix to 8 or 11 bits.
    """
    return torch.autocast(x.device.type, enabled=False)


def input_second_moments(task: BlockTask, token_weights: TokenWeights = "uniform") -> dict[str, Tensor]:
    """Mean square of each input channel on the quantized stream: the diagonal of the Gram matrix over the tokens.

    Over the samples of all processes, if there are several.

    Returns:
        for each linear of the family, float32 ``[i]``.
    """

    def squares(x: Tensor, weights: Tensor | None) -> Tensor:
        square = x.float().square()
        return (square if weights is None else square * weights.unsqueeze(-1)).sum(1).double().sum(0)

    return {name: mean.float() for name, mean in _means(task, token_weights, squares).items()}


def input_grams(task: BlockTask, token_weights: TokenWeights = "uniform") -> dict[str, Tensor]:
    """Mean of ``x x^T`` over the tokens of the quantized stream, for each linear of the family float32 ``[i, i]``."""

    def products(x: Tensor, weights: Tensor | None) -> Tensor:
        return gram_of(x.flatten(0, 1), None if weights is None else weights.flatten())

    return _means(task, token_weights, products)


def _means(
    task: BlockTask, token_weights: TokenWeights, sum_over: Callable[[Tensor, Tensor | None], Tensor]
) -> dict[str, Tensor]:
    """Mean over all tokens of something summed over inputs ``[batch, t, i]`` with weights ``[batch, t]``.

    Raises:
        UserError: see ``check_finite``.
    """
    sums: dict[str, Tensor] = {}
    seen = dict.fromkeys((group[0] for group in task.layout.groups), 0)
    bad: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        bad[name] = bad_samples(x, task) + bad.get(name, 0)
        batch = x.unflatten(0, (-1, task.inputs.shape[1]))
        weights = None
        if token_weights == "relative":
            targets = gather_samples(task.targets, slice(seen[name], seen[name] + len(batch)), task.device)
            weights = relative_weights(targets)
        seen[name] += len(batch)
        total = sum_over(batch, weights)
        sums[name] = sums[name].add_(total) if name in sums else total  # in place: a Gram matrix may be large

    with task.quantized_activations(), observed(task.block, tuple(seen), add):
        task.visit(task.inputs)
    tokens = task.inputs.shape[0] * task.inputs.shape[1] * collectives.world_size()
    means = {name: collectives.all_reduce_sum(total) / tokens for name, total in sums.items()}
    for name, mean in means.items():
        check_finite(task, name, mean, collectives.all_reduce_sum(bad[name]))
    return {name: means[group[0]] for group in task.layout.groups for name in group}


def second_moments_for(
    clipping: Clipping, task: BlockTask, token_weights: TokenWeights = "uniform"
) -> dict[str, Tensor]:
    """What a clipping wants to know of the inputs of each linear; nothing if it needs none."""
    if clipping.needs_gram:
        return input_grams(task, token_weights)
    return input_second_moments(task, token_weights) if clipping.needs_second_moment else {}


def gram_of(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_t w_t x_t x_t^T`` of ``[tokens, i]`` in float32.

    Without weights ``[tokens]``, half-precision inputs are multiplied exactly, with float32 sums.
    """
    with exact(x):
        if weights is None and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            return torch.mm(x.t(), x, out_dtype=torch.float32)
        x = x.float() if weights is None else x.float() * weights.sqrt().unsqueeze(1)
        return x.t() @ x


def powers_of(weight: Tensor, gram: Tensor) -> Tensor:
    """``w S w^T`` of each row of ``[o, i]``, with ``[i, i]``: what each output of ``W x`` carries, ``[o]``."""
    with exact(weight):
        return (weight @ gram).mul_(weight).sum(1)


def power_of(weight: Tensor, gram: Tensor) -> Tensor:
    """``tr(W S W^T)`` of ``[o, i]`` and ``[i, i]``, a scalar: what ``W x`` carries, summed over its outputs."""
    return powers_of(weight, gram).sum()


def relative(error: Tensor, power: Tensor) -> Tensor:
    """``error / power``; the error as it is where outputs carry nothing (weights of zero, dead inputs)."""
    return error / torch.where(power > 0, power, 1.0)


def bad_samples(x: Tensor, task: BlockTask) -> Tensor:
    """How many samples have inputs ``[batch t, i]`` that are not finite, a scalar on the device."""
    return (~torch.isfinite(x)).any(1).unflatten(0, (-1, task.inputs.shape[1])).any(1).sum()


def check_finite(task: BlockTask, name: str, gathered: Tensor, bad: Tensor, what: str = "Gram matrix") -> None:
    """Refuse what no solver or search can use.

    Args:
        name: of the linear whose inputs they are.
        gathered: their Gram matrix, its diagonal or their range, over the samples of all processes.
        bad: how many of those samples had inputs that are not finite.
        what: was gathered.

    Raises:
        UserError: names the linear, and how many samples are to blame; in all processes, told by the first.
    """
    number, samples = int(bad), len(task.inputs) * collectives.world_size()
    if not number and all_finite(gathered):
        return
    why = f"{number} of {samples} samples have inputs that are not" if number else "its inputs are too large to square"
    raise collectives.error_on_rank0(
        f"{task.name} {name}: the {what} is not finite, {why}; use trainer.precision 32-true or bf16-mixed, or "
        "other calibration text"
    )
