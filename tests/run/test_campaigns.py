# SPDX-License-Identifier: Apache-2.0
"""A small part of the campaigns of ``tests/campaigns``: random kills, damaged files, and their tables."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.campaigns.kills import table

ROOT = Path(__file__).resolve().parents[2]


def campaign(name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", f"tests.campaigns.{name}", "--processes", "1", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_kills_at_random_times_over_three_stages_leave_no_fault() -> None:
    done = campaign("kills", "--cases", "awq-quantease-rounding omniq", "--kills", "8", "--only", "random")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills" in done.stdout
    assert ", 0 faults" in done.stdout


@pytest.mark.slow
def test_damaged_files_leave_no_fault() -> None:
    done = campaign("damage", "--files", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 damaged files, 0 faults" in done.stdout


@pytest.mark.slow
def test_campaign_whose_seconds_are_over_prints_its_table() -> None:
    begun = time.monotonic()
    done = campaign("kills", "--cases", "gptq-rounding", "--seconds", "12")
    assert time.monotonic() - begun < 150  # the whole campaign takes a quarter of an hour
    assert "gptq-rounding omniq" in done.stdout
    assert "runs that ended after them, 0 faults" in done.stdout


def test_table_of_runs_that_differ_counts_fault_and_moments(capsys: pytest.CaptureFixture[str]) -> None:
    facts = [
        {"case": 0, "digest": "a", "aims": {"boundary": 2, "rename": 3}},
        {"case": 0, "digest": "b", "aims": {"boundary": 2, "rename": 3}},
        {"case": 0, "kill": "rename", "at": ["torn", "model", 1]},
        {"case": 0, "kill": "rename", "at": ["torn", "model", 1]},  # the same moment again
        {"case": 0, "fault": "other bits"},
        {"fault": "a worker failed"},
    ]
    assert table(["one"], facts) == ["one other bits", " a worker failed", "one two runs without a kill differ"]
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["all", "0", "0", "of", "2", "1", "of", "3", "0", "1"]
