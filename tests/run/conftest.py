# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of a run."""

from collections.abc import Iterator

import pytest

from tests.helpers.killing import Attempts
from tests.helpers.reference_run import STAGES, Reference
from tests.helpers.runs import SMALL, outcome, write_run


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp("resume")
    args = write_run(folder, model=SMALL, stages=STAGES)
    with Attempts(folder) as attempts:
        first = attempts.run(args, folder / "reference")
        assert first.status == 0, first.output
        yield Reference(folder, args, attempts, first, outcome(folder / "reference"))
