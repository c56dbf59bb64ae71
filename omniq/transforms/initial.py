# SPDX-License-Identifier: Apache-2.0
"""Initial values of a transform: SmoothQuant's scales and Outlier Suppression+'s shifts, from one pass over the inputs.

For input channel ``j`` with observed range ``[lo_j, hi_j]``:

    d_j = (hi_j + lo_j) / 2                                 shift (Outlier Suppression+, arXiv 2304.09145)
    a_j = max(hi_j - d_j, d_j - lo_j)                       size of the activations after the shift (d = 0 without one)
    w_j = max over every reader and output row |W_oj|       size of the weights
    s_j = a_j^alpha / w_j^(1 - alpha)                       scale (SmoothQuant, arXiv 2211.10438, equation 4)

Scales between queries and keys start at one. With grouped-query attention, the channels of all readers of a KV head are
combined: the widest range and the largest weight.

Deviations from OmniQuant's code: all readers of an input count, not only q_proj or up_proj. ``a`` is measured after the
shift. The range is exact over the samples, where the published code takes the maximum for scales but an exponential
average for shifts.

Shapes: ``o`` output features, ``i`` input features, ``c`` parameters of an equivalence.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

LIMIT = 10.0  # largest |theta|: e^10 = 22026, of the order of the largest half-precision number
FLOOR = 1e-5  # smallest activation and weight size, so that a dead channel gets a finite scale (OmniQuant's code)


@dataclass
class ChannelRanges:
    """Smallest and largest value of every channel of some inputs.

    Args:
        lo, hi: float32 ``[i]`` by the name of the linear that reads the input.
    """

    lo: dict[str, Tensor] = field(default_factory=dict)
    hi: dict[str, Tensor] = field(default_factory=dict)


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale ``activation^alpha / weight^(1 - alpha)`` from sizes ``[c]``, clamped to the limits."""
    scale = activation.clamp(min=FLOOR) ** alpha / weight.clamp(min=FLOOR) ** (1 - alpha)
    return scale.clamp(math.exp(-LIMIT), math.exp(LIMIT))
