# SPDX-License-Identifier: Apache-2.0
"""The table of dtypes agrees with torch and with the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from omniq.grid.dtypes import CODES, MODEL_DTYPES, SCALE_DTYPES, dtype_name, holds_weights, torch_dtype


@pytest.mark.parametrize("name", CODES)
def test_dtype_codes_equal_those_of_safetensors(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1, dtype=torch_dtype(name))}, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.get_slice("x").get_dtype() == CODES[name]
    assert dtype_name(torch_dtype(name)) == name


def test_dtypes_of_models_scales_and_weights_are_floating_point() -> None:
    floating = {name for name in CODES if torch_dtype(name).is_floating_point}
    assert {name for name in CODES if holds_weights(name)} == floating
    assert {name for name, code in CODES.items() if holds_weights(code)} == floating
    assert set(MODEL_DTYPES) == set(SCALE_DTYPES) == floating - {"float64"}
    assert not holds_weights("F8_E4M3")
