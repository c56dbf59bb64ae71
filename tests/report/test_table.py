# SPDX-License-Identifier: Apache-2.0
"""Perplexities as a table and as JSON."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from omniq.errors import UserError
from omniq.evaluate.result import PerplexityResult
from omniq.report.table import perplexity_table, write_results


def test_perplexity_results_round_trip_through_json(tmp_path: Path) -> None:
    finite = PerplexityResult(math.exp(2.0), 2.0, 30, 3, 0.5)
    overflown = PerplexityResult(math.inf, 800.0, 30, 3, 0.5)
    broken = PerplexityResult(math.nan, math.nan, 30, 3, 0.5)
    for result in (finite, overflown):
        assert PerplexityResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result
    assert broken.to_json() == {"perplexity": None, "nll": None, "tokens": 30, "windows": 3, "seconds": 0.5}
    assert math.isnan(PerplexityResult.from_json(broken.to_json()).perplexity)
    write_results(tmp_path / "r.json", {"full": finite, "bad": overflown}, seed=2)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "seed": 2,
        "results": {"full": finite.to_json(), "bad": overflown.to_json()},
    }
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(UserError, match=r"cannot write .*r\.json"):
        write_results(tmp_path / "none" / "r.json", {"full": finite})


def test_perplexity_table_compares_with_first_row() -> None:
    results = {
        "full precision": PerplexityResult(20.0, 2.9957, 20470, 10, 3.0),
        "learned": PerplexityResult(25.0, 3.2189, 20470, 10, 3.0),
        "round to nearest": PerplexityResult(1.234e7, 16.3, 20470, 10, 3.0),
        "broken": PerplexityResult(math.nan, math.nan, 20470, 10, 3.0),
        "overflown": PerplexityResult(math.inf, 800.0, 20470, 10, 3.0),
    }
    console = Console(width=100)
    with console.capture() as capture:
        console.print(perplexity_table(results, title="wikitext2"))
    shown = {line.split("│")[1].strip(): line.split("│")[2:4] for line in capture.get().splitlines() if "│" in line}
    shown = {name: [cell.strip() for cell in cells] for name, cells in shown.items()}
    assert shown["full precision"] == ["20.00", ""]
    assert shown["learned"] == ["25.00", "+25.0%"]
    assert shown["round to nearest"][0] == "1.2e+07"
    assert shown["broken"] == ["nan", ""]
    assert shown["overflown"] == ["inf", ""]
    assert "20,470" in capture.get()


def test_perplexity_table_shows_long_path_whole() -> None:
    path = "/a/rather/long/path/of/a/checkpoint/" + "that-goes-on" * 6
    console = Console(width=80)
    with console.capture() as capture:
        console.print(perplexity_table({path: PerplexityResult(20.0, 2.9957, 20470, 10, 3.0)}))
    rows = [line for line in capture.get().splitlines() if "│" in line]
    assert "".join(line.split("│")[1].strip() for line in rows) == path
    assert "…" not in capture.get()
