# SPDX-License-Identifier: Apache-2.0
"""The weight of each token in the objective of a stage.

``uniform`` is the choice of all papers: the sum of squares over all elements. In most language models, however, a few
tokens (the first of a text, delimiters) have activations a thousand times larger than all others (Sun et al., arXiv
2402.17762), so one token in two thousand contributes nearly all of that sum. The next block never sees these
magnitudes, because it normalises each token first. ``relative`` therefore divides the error of each token by its mean
square in the output of the full-precision block,

    w_t = 1 / mean_c(y_tc^2),      loss = mean_t w_t mean_c((y^_tc - y_tc)^2),      S = sum_t w_t x_t x_t^T

The Gram matrix S of the layer-wise stages uses the same weights.

Shapes: ``b`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

from torch import Tensor
from torch.nn.functional import mse_loss

from omniq.calibration.settings import TokenWeights


def relative_weights(targets: Tensor) -> Tensor:
    """``w_t`` of outputs ``[..., h]``, float32 ``[...]``; limited to 1e12, the weight of a token that is zero."""
    return targets.float().square().mean(-1).clamp_min(1e-12).reciprocal()


def weighted_error(outputs: Tensor, targets: Tensor, weights: TokenWeights, reference: Tensor | None = None) -> Tensor:
    """Mean squared error of ``[b, t, h]``, a float32 scalar.

    Args:
        outputs, targets: the tensors to compare, each ``[b, t, h]``.
        weights: how to weight the tokens.
        reference: the outputs ``[b, t, h]`` whose magnitude determines relative weights; by default the targets.
    """
    if weights == "uniform":
        return mse_loss(outputs.float(), targets.float())
    squares = (outputs.float() - targets.float()).square()
    return (squares.mean(-1) * relative_weights(targets if reference is None else reference)).mean()
