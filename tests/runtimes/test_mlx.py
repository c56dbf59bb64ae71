# SPDX-License-Identifier: Apache-2.0
"""Exports in format mlx, in MLX itself on the CPU (``make runtimes``)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omniq.export import find_format
from omniq.export.formats.mlx import MODEL_TYPES
from omniq.export.verify.reference import Distance, reference_logits
from omniq.export.verify.runtimes import RUNTIMES
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from tests.helpers.exported import export, rounded
from tests.helpers.opening import SMOL, needs_smol
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny

mx = pytest.importorskip("mlx.core", reason="pip install 'omniq[mlx]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="pip install 'omniq[mlx]'")
MLX = next(runtime for runtime in RUNTIMES if runtime.name == "mlx")


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_tiny_model_in_mlx_has_the_same_logits(family: str, tmp_path: Path) -> None:
    grid = Grid(4, 32)
    own: dict[str, Any] = {"tie_word_embeddings": True} if family.startswith("gemma") else {}
    own |= {"num_hidden_layers": 6} if family == "gemma3_text" else {}  # the period of its sliding windows
    save_tiny(tmp_path / "source", family, grid.scale_dtype, **own)
    source = SourceModel.open(tmp_path / "source", attention="eager")
    out = export(source, rounded(source, grid), tmp_path / "out", format="mlx")
    chosen, scheme, tokens = find_format("mlx"), scheme_of(grid), torch.arange(60, 76)
    with chosen.container.read(out, chosen.codec(scheme)) as reader:
        expected = reference_logits(reader, scheme, tokens, out)
    found = Distance.of(MLX.log_probabilities(out, tokens), expected)
    assert found.divergence < 1e-5


@needs_smol
@pytest.mark.slow
@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, 64), Grid(2, 32, True)])
def test_smollm2_in_mlx_has_the_same_weights(grid: Grid, tmp_path: Path) -> None:
    source: Any = SourceModel.open(SMOL)
    results = rounded(source, grid)
    out = export(source, results, tmp_path / "out", format="mlx")
    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(str(out))
    modules = dict(model.named_modules())
    for index, result in enumerate(results):
        for name, linear in result.linears.items():
            found = modules[f"model.layers.{index}.{name}"]
            weight = mx.dequantize(found.weight, found.scales, found.biases, found.group_size, found.bits)
            assert np.abs(np.array(weight.astype(mx.float32)) - linear.dequantize().numpy()).max() == 0.0
    if grid.bits == 4:
        assert "Paris" in mlx_lm.generate(model, tokenizer, prompt="The capital of France is", max_tokens=4)
