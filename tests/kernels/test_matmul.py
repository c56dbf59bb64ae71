# SPDX-License-Identifier: Apache-2.0
"""How a run has float32 multiplied on a CPU: set for the run, put back after it, and precise enough for codes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from omniq.cli.command import main
from omniq.kernels.matmul_precision import matmul_precision
from omniq.run import loop
from tests.helpers.runs import QUICK, SMALL, write_run

CPU = torch.device("cpu")
newer = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has no name of oneDNN's own for it"
)


def older_name() -> str:
    return torch.get_float32_matmul_precision()


def newer_names() -> list[str]:
    return [each.fp32_precision for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = older_name()
    yield
    torch.set_float32_matmul_precision(before)
    for each in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        if hasattr(each, "fp32_precision"):
            each.fp32_precision = "none"


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_matmul_precision_sets_and_restores_older_setting(before: str) -> None:
    torch.set_float32_matmul_precision(before)
    with matmul_precision("bf16", CPU):
        assert older_name() == "medium"
        with matmul_precision("float32", CPU):  # a layer-wise stage inside such a run
            assert older_name() == "highest"
        assert older_name() == "medium"
    assert older_name() == before
    for precision in ("float32", "tf32"):  # the latter is no matter of CPUs
        with matmul_precision(precision, CPU):  # type: ignore[arg-type]
            assert older_name() != "medium"
    assert older_name() == before


@newer
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_matmul_precision_sets_and_restores_newer_settings(before: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = before
    expected = newer_names()
    with matmul_precision("bf16", CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with matmul_precision("float64", CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert newer_names() == expected


def test_matmul_precision_after_error_is_restored() -> None:
    before = older_name()
    with pytest.raises(KeyError), matmul_precision("bf16", CPU):
        raise KeyError
    assert older_name() == before


@pytest.mark.parametrize("shape", [(64, 96, 48), (7, 576, 192)])
def test_matmul_precision_bf16_product_error_is_bounded(shape: tuple[int, int, int]) -> None:
    """Relative to float64: bfloat16 factors with float32 sums at worst, and the same bits twice."""
    n, i, o = shape
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=draw) for size in ((n, i), (o, i)))
    exact = x.double() @ w.double().T
    with matmul_precision("bf16", CPU):
        y = torch.nn.functional.linear(x, w)
        assert torch.equal(y, torch.nn.functional.linear(x, w))
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 6e-3  # two roundings to 8 bits, 2^-9 each at most; measured without AMX: 4e-7
    with matmul_precision("float32", CPU):
        assert (torch.nn.functional.linear(x, w).double() - exact).norm() / exact.norm() < 2e-6


@pytest.mark.parametrize(("matmul", "level"), [("bf16", "medium"), ("tf32", "highest"), ("ieee", "highest")])
def test_run_with_matmul_option_sets_and_restores_precision(
    matmul: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    calibrate: Callable[..., None] = loop.calibrate

    def watched(*args: object) -> None:
        seen.append(older_name())
        calibrate(*args)

    monkeypatch.setattr(loop, "calibrate", watched)
    assert main([*write_run(tmp_path, model=SMALL, **QUICK), "--matmul", matmul]) == 0
    assert seen == [level]
    assert older_name() == "highest"


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_matmul_precision_for_cuda_is_restored(before: str) -> None:
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        for precision, tf32 in (("tf32", True), ("float32", False), ("float64", False)):
            with matmul_precision(precision, torch.device("cuda")):  # type: ignore[arg-type]
                assert torch.backends.cuda.matmul.allow_tf32 == tf32
            assert torch.get_float32_matmul_precision() == before
            assert torch.backends.cuda.matmul.allow_tf32 == (before != "highest")
    finally:
        torch.set_float32_matmul_precision(usual)
