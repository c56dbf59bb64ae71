# SPDX-License-Identifier: Apache-2.0
"""The display of a run on a simulated clock: time left, rate, losses and memory."""

import io

import pytest
from rich.console import Console

from omniq.report.display import Display

BLOCKS = 30


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def calibrate(display: Display, clock: Clock, index: int, seconds: float, steps: int = 100, stages: int = 1) -> None:
    """One block from its first step to its line."""
    for stage in range(stages):
        display.stage(index, f"Stage{stage}", 0, steps)
        for step in range(steps):
            clock.now += seconds / steps / stages
            display.step(step + 1, {"loss": 1e-3})
    display.block(index, "loss 1")


def shown(display: Display, width: int = 140) -> list[str]:
    """The bars as they stand, one line each."""
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(display.progress.get_renderable())
    return [line.strip() for line in capture.get().splitlines()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def display(clock: Clock) -> Display:
    return Display(BLOCKS, Console(file=io.StringIO(), width=140, get_time=clock))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("seconds", [0.5, 20.0, 60.0, 3600.0])
def test_display_time_left_follows_seconds_per_block(
    display: Display, clock: Clock, seconds: float, stages: int
) -> None:
    """The estimate exists from the first block on, for short and for long blocks."""
    with display:
        assert display.progress.tasks[0].time_remaining is None
        for index in range(10):
            calibrate(display, clock, index, seconds, stages=stages)
            left = display.progress.tasks[0].time_remaining
            assert left == pytest.approx((BLOCKS - index - 1) * seconds, abs=1.0)  # rich rounds up
        assert display.progress.tasks[0].elapsed == pytest.approx(10 * seconds)


def test_display_of_resumed_run_counts_calibrated_blocks_only(display: Display, clock: Clock) -> None:
    with display:
        for index in range(9):
            clock.now += 0.01
            display.block(index, "as found")
        calibrate(display, clock, 9, 20.0)
        assert display.progress.tasks[0].completed == 10
        assert display.progress.tasks[0].time_remaining == pytest.approx(400, abs=1)  # rich rounds up


def test_display_resumed_from_streams_starts_at_later_block(display: Display, clock: Clock) -> None:
    """No earlier block is shown."""
    with display:
        clock.now += 7.0
        calibrate(display, clock, 9, 20.0)
        assert display.progress.tasks[0].time_remaining == pytest.approx(400, abs=1)  # rich rounds up
        calibrate(display, clock, 10, 20.0)
        assert display.progress.tasks[0].time_remaining == pytest.approx(380, abs=1)
        assert display.progress.tasks[0].elapsed == pytest.approx(47)


def test_display_lines_show_progress_time_and_losses(display: Display, clock: Clock) -> None:
    with display:
        calibrate(display, clock, 0, 50.0, steps=5)
        display.stage(1, "OmniQuant", 20, 1000)
        for step in range(20, 60):
            clock.now += 0.125
            display.step(step + 1, {"loss": 1.5e-3, "augmented_loss": 2e-4})
    blocks, steps = shown(display)
    assert blocks.startswith("blocks")
    assert " 1/30 " in blocks
    assert "0:24:10 50.0 s each peak" in blocks
    assert blocks.endswith("GiB")
    assert steps.startswith("block 1 OmniQuant")
    assert steps.endswith("60/1000 0:00:05 0:01:58 8.0/s       loss 1.500e-03  augmented_loss 2.000e-04")


def test_display_on_narrow_terminal_keeps_time_left_and_rate(clock: Clock) -> None:
    display = Display(BLOCKS, Console(file=io.StringIO(), width=80, get_time=clock))
    with display:
        calibrate(display, clock, 0, 50.0)
        display.stage(1, "LearnedRounding", 0, 2560)
        for step in range(40):
            clock.now += 0.125
            display.step(step + 1, {"loss": 1.5e-3, "norms": 2e-4})
    blocks, steps = shown(display, 80)
    assert "0:24:10 50.0 s each peak" in blocks
    assert "40/2560 0:05:15 8.0/s       loss" in steps
