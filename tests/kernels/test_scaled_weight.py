# SPDX-License-Identifier: Apache-2.0
"""A weight with factors that are not multiplied yet: factors accumulate, and products need no scaled matrix."""

import torch

from omniq.kernels.scaled_weight import ScaledWeight, materialize
from tests.helpers.fake_quant import random_factors


def test_scaled_weight_factors_accumulate_and_products_equal_matrix() -> None:
    w, vector = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    rows, columns = random_factors(3, 5, True, True)
    weight = ScaledWeight(w).times_rows(rows).times_columns(columns).times_rows(rows)
    matrix = rows.square().diag() @ w @ columns.diag()
    torch.testing.assert_close(materialize(weight), matrix, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.product(vector), matrix @ vector, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert ScaledWeight(w.bfloat16()).product(vector.float()).dtype == torch.float32
    assert materialize(w) is w
