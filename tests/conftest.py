# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several test files. Tests marked ``gpu`` run only where a GPU exists."""

from pathlib import Path

import pytest
import torch

from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult
from tests.helpers.exported import opened, rounded
from tests.helpers.runs import SMALL, write_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    """A tiny source model of an export."""
    return opened(tmp_path / "source", Grid(4, 32))


@pytest.fixture
def results(source: SourceModel) -> list[BlockResult]:
    """The finished blocks of that source, rounded to nearest."""
    return rounded(source, Grid(4, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and a ``run.yaml`` that works."""
    folder = tmp_path_factory.mktemp("cli")
    write_run(folder, model=SMALL)
    return folder
