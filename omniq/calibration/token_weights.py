# SPDX-License-Identifier: Apache-2.0
"""How much each token counts in what a stage minimises.

``uniform`` is what every paper has: the sum of squares over all elements. But in most language models a few tokens (the
first of a text, delimiters) carry activations a thousand times larger than all others (Sun et al., arXiv 2402.17762),
and then one token in two thousand holds nearly all of that sum. The next block never sees those magnitudes: it
normalises each token first. ``relative`` therefore divides each token's error by the mean square of the token in the
full-precision block's output,

    w_t = 1 / mean_c(y_tc^2),      loss = mean_t w_t mean_c((y^_tc - y_tc)^2),      S = sum_t w_t x_t x_t^T

which weighs the Gram matrix of the layer-wise stages alike.

Shapes: ``b`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import mse_loss

TokenWeights = Literal["uniform", "relative"]


def relative_weights(targets: Tensor) -> Tensor:
    """``w_t`` of outputs ``[..., h]``, float32 ``[...]``; at most 1e12, for a token that is zero."""
    return targets.float().square().mean(-1).clamp_min(1e-12).reciprocal()


def weighted_error(outputs: Tensor, targets: Tensor, weights: TokenWeights, reference: Tensor | None = None) -> Tensor:
    """Mean squared error of ``[b, t, h]``, a float32 scalar.

    Args:
        outputs, targets: what is compared.
        weights: of the tokens.
        reference: the outputs ``[b, t, h]`` whose magnitude the weights are taken from; the targets if not given.
    """
    if weights == "uniform":
        return mse_loss(outputs.float(), targets.float())
    squares = (outputs.float() - targets.float()).square()
    return (squares.mean(-1) * relative_weights(targets if reference is None else reference)).mean()
