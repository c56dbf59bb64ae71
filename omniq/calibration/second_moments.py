# SPDX-License-Identifier: Apache-2.0
"""Second moments of the inputs of a block's linears, for the searched range and the AWQ-like clip search.

GPTQ calls twice the sum of ``x x^T`` the Hessian. Here, the mean of ``x x^T`` is called the Gram matrix, and its
diagonal the second moment.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from omniq.calibration.input_statistics import InputGram, InputSquares
from omniq.calibration.observe import observe
from omniq.calibration.settings import TokenWeights
from omniq.calibration.task import BlockTask
from omniq.quantizers.clipping import Clipping


def input_second_moments(task: BlockTask, token_weights: TokenWeights = "uniform") -> dict[str, Tensor]:
    """Mean square of each input over the tokens: for each linear float32 ``[i]``; ones if no token reaches it."""
    return {name: mean.float() for name, mean in _means(task, token_weights, InputSquares()).items()}


def input_grams(task: BlockTask, token_weights: TokenWeights = "uniform") -> dict[str, Tensor]:
    """Mean of ``x x^T`` over the tokens: for each linear float32 ``[i, i]``; the identity if no token reaches it."""
    return _means(task, token_weights, InputGram())


def _means(task: BlockTask, token_weights: TokenWeights, statistic: InputSquares | InputGram) -> dict[str, Tensor]:
    seen = observe(task, [statistic], token_weights=token_weights)
    means: dict[str, Tensor] = {}
    unreached: list[str] = []
    for group in task.layout.groups:
        tokens, totals = seen[group[0]].tokens, seen[group[0]].totals
        if tokens:
            mean = totals[0].div_(tokens)
        else:
            mean = unknown_moment(task.linear(group[0]), isinstance(statistic, InputGram))
            unreached += group
        means |= dict.fromkeys(group, mean)
    note_unreached(task, unreached)
    return means


def unknown_moment(linear: nn.Linear, gram: bool) -> Tensor:
    """The second moment ``[i]`` or ``[i, i]`` to assume for an unknown input: equal weight for all channels."""
    ones = torch.ones(linear.in_features, device=linear.weight.device)
    return torch.diag(ones) if gram else ones


def note_unreached(task: BlockTask, names: Sequence[str]) -> None:
    """Name the linears that no token reaches in the summary of the block."""
    if names:
        task.notes["unreached"] = f"no calibration token reaches {', '.join(names)}: rounded to nearest"


def note_starved(task: BlockTask, tokens: Mapping[str, int]) -> None:
    """Name experts that see fewer tokens than their inputs, with their tokens, in the summary of the block."""
    if tokens:
        listed = ", ".join(f"{name} ({number})" for name, number in tokens.items())
        task.notes["too few tokens"] = f"fewer calibration tokens than inputs reach {listed}: rounded to nearest"


def second_moments_for(
    clipping: Clipping, task: BlockTask, token_weights: TokenWeights = "uniform"
) -> dict[str, Tensor]:
    """The second moments that a clipping needs, by linear; empty if it needs no statistics."""
    if clipping.needs_gram:
        return input_grams(task, token_weights)
    return input_second_moments(task, token_weights) if clipping.needs_second_moment else {}
