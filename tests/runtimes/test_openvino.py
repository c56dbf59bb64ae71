# SPDX-License-Identifier: Apache-2.0
"""Exports in format gguf, in OpenVINO (``make runtimes``)."""

from pathlib import Path

import pytest

from omniq.export import find_format
from omniq.export.verify.reference import Distance, reference_logits
from omniq.export.verify.runtimes import RUNTIMES
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from tests.helpers.exported import export, rounded
from tests.helpers.opening import SMOL, needs_smol
from tests.helpers.schemes import scheme_of

pytest.importorskip("openvino_genai", reason="pip install 'omniq[openvino]'")
OPENVINO = next(runtime for runtime in RUNTIMES if runtime.name == "openvino")


@needs_smol
@pytest.mark.slow
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 64), Grid(8, 64, True)])
def test_smollm2_in_openvino_has_the_same_logits(grid: Grid, tmp_path: Path) -> None:
    source = SourceModel.open(SMOL)
    out = export(source, rounded(source, grid), tmp_path / "out", format="gguf")
    tokens = source.tokenizer()("The capital of France is", return_tensors="pt").input_ids[0]
    chosen, scheme = find_format("gguf"), scheme_of(grid)
    with chosen.container.read(out, chosen.codec(scheme)) as reader:
        expected = reference_logits(reader, scheme, tokens, out)
    found = Distance.of(OPENVINO.log_probabilities(out, tokens), expected)
    assert found.largest < 1e-3  # measured: 7e-5 on 16 tokens of another text
