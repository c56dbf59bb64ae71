# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ and AutoRound checkpoints in their own readers. ``make runtimes`` installs these and runs the tests.

Both sides compute the logits of the stock model in float16: the reader from the files, omniq from ``(q - z) s``.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq.errors import CorruptFile
from omniq.export import find_format
from omniq.grid.affine import Grid
from omniq.grid.rule import Rule
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear
from tests.helpers.exported import WINDOWS, export, verify
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny

FORMATS = ("gptq", "awq", "auto-round")
# GPTQModel's kernels of 4 bits on a CPU multiply in bfloat16. Measured: 5.6e-3. All other kernels: 0.0.
BFLOAT16 = 1e-2


def needed(format: str) -> pytest.MarkDecorator:
    """Skip a test if the packages of a format are missing; the reason is the command that installs them."""
    requires = find_format(format).codec(Scheme()).requires
    missing = any(find_spec(package.partition(">=")[0].replace("-", "_")) is None for package in requires)
    return pytest.mark.skipif(missing, reason=f"pip install 'omniq[{format}]'")


def cases(*arguments: Any) -> list[Any]:
    return [pytest.param(format, *rest, marks=needed(format)) for format, *rest in arguments]


@pytest.fixture(autouse=True)
def no_compilation() -> Iterator[None]:
    """GPTQModel compiles the unpacking of every linear, which takes a minute on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def blocks_of(source: SourceModel, scheme: Scheme) -> list[BlockResult]:
    """Every block, rounded to nearest on the grids of a scheme; some zero points are 0 or the largest code."""
    blocks = []
    for index in range(source.num_blocks):
        linears, others = {}, dict(source.block(index, dtype=torch.float32).named_parameters())
        for name in source.layout(index).linears:
            grid = scheme.grid_of(f"{source.block_name(index)}.{name}")
            if grid is not None:
                weight = others.pop(f"{name}.weight").data.clone()
                weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
                scale, zero_point = grid.fit(*grid.range(weight))
                linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
        blocks.append(BlockResult(linears, {name: value.data for name, value in others.items()}))
    return blocks


def exported(folder: Path, format: str, scheme: Scheme, family: str = "llama", **options: Any) -> Any:
    """Export a tiny model; returns the error of its logits in the reader, and a function that verifies again."""
    source = SourceModel.open(save_tiny(folder / "source", family))
    options |= {"format": format, "scheme": scheme}
    out = export(source, blocks_of(source, scheme), folder / "out", **options)

    def error(tolerance: float) -> float:
        blocks = blocks_of(source, scheme)
        report = verify(out, source, blocks, **options, windows=WINDOWS, tolerance=tolerance)
        assert report.lacking is None
        return report.relative_error

    return error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize(
    ("format", "bits", "tolerance"),
    cases(
        *(("gptq", bits, BFLOAT16 if bits == 4 else 0.0) for bits in (2, 3, 4, 8)),
        ("awq", 4, BFLOAT16),
        *(("auto-round", bits, 0.0) for bits in (2, 3, 4, 8)),
    ),
)
def test_reader_computes_our_logits(
    format: str, bits: int, tolerance: float, group: int, symmetric: bool, tmp_path: Path
) -> None:
    error = exported(tmp_path, format, scheme_of(Grid(bits, group, symmetric)))
    assert error(tolerance) <= tolerance


@pytest.mark.parametrize(("format", "tolerance"), cases(("gptq", BFLOAT16), ("awq", BFLOAT16), ("auto-round", 0.0)))
def test_reader_computes_our_logits_from_wider_codes(format: str, tolerance: float, tmp_path: Path) -> None:
    error = exported(tmp_path, format, Scheme("W3A16g32"), container_bits=4)
    assert error(tolerance) <= tolerance


@pytest.mark.parametrize("family", ["opt", "phi3", "qwen3", "gemma"])
@pytest.mark.parametrize(("format", "tolerance"), cases(("gptq", BFLOAT16), ("awq", BFLOAT16), ("auto-round", 1e-3)))
def test_reader_opens_other_families(format: str, tolerance: float, family: str, tmp_path: Path) -> None:
    """auto-round adds biases after it has rounded the product to float16. Measured for OPT: 7.1e-4; others: 0.0."""
    assert exported(tmp_path, format, Scheme("W4A16g32"), family)(tolerance) <= tolerance


@pytest.mark.parametrize(("format", "tolerance"), cases(("gptq", BFLOAT16), ("awq", BFLOAT16), ("auto-round", 0.0)))
def test_reader_leaves_linears_in_floating_point(format: str, tolerance: float, tmp_path: Path) -> None:
    scheme = Scheme("W4A16g32", rules=(Rule("model.layers.0.*.down_proj", "none"), Rule("*.1.*.o_proj", "none")))
    assert exported(tmp_path, format, scheme)(tolerance) <= tolerance


@needed("auto-round")
def test_auto_round_reads_a_grid_for_each_linear(tmp_path: Path) -> None:
    rules = (Rule("*.down_proj", "W8A16g64", symmetric=True), Rule("*.0.*.q_proj", "W2A16"), Rule("*.k_proj", "none"))
    assert exported(tmp_path, "auto-round", Scheme("W3A16g32", rules=rules))(0.0) == 0.0


@needed("gptq")
def test_wrong_version_of_gptq_shows_in_logits(tmp_path: Path) -> None:
    """omniq compares the config first; this is what its reader would compute otherwise."""
    source = SourceModel.open(save_tiny(tmp_path / "source"))
    scheme = Scheme("W3A16g32")
    blocks = blocks_of(source, scheme)
    out = export(source, blocks, tmp_path / "out", format="gptq", scheme=scheme)
    file = out / "config.json"
    config = json.loads(file.read_text())
    right = find_format("gptq").container.open(out)(WINDOWS).logits
    config["quantization_config"]["checkpoint_format"] = "gptq"
    file.write_text(json.dumps(config))
    wrong = find_format("gptq").container.open(out)(WINDOWS).logits
    assert (wrong - right).norm() / right.norm() > 0.3  # measured: 1.0
    with pytest.raises(CorruptFile, match="does not describe the weights"):
        verify(out, source, blocks, format="gptq", scheme=scheme)
